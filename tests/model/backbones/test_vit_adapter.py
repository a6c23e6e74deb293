"""ViT-Adapter with a Mask2Former head against outputs of DINOv3's code, and training with a frozen transformer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from m2f.eval.inference.windows import window_places
from m2f.model.backbones.build import build_backbone
from m2f.model.backbones.vit_adapter import extraction_layers
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.export.dinov3 import require_dinov3
from m2f.model.export.official import write_official
from m2f.model.inference.class_scores import ClassScores, Window, WindowScores
from m2f.model.inference.mask_resize import ImageGeometry
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter
from m2f.model.structures import Predictions
from m2f.model.weights.build import build_with_weights
from m2f.model.weights.files import read_state
from m2f.model.weights.load import load_weights
from m2f.model.weights.names import is_head_alone, to_dinov3_names
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.param_groups import build_param_groups

VIT = "segmentation_model.0.backbone."
LEVELS = ((2, 3), (4, 6), (8, 12))
"""Sizes of the maps in the golden case. Decoder layers attend to them in turn."""


def config_of(described: dict) -> ModelConfig:
    names = ("embed_dim", "depth", "num_heads")
    options = {name: described[name] for name in names} | {"mlp_ratio": described["ffn_ratio"], "init_values": 1.0}
    width = described["hidden_dim"]
    return ModelConfig(
        backbone=ViTAdapterBackboneConfig(
            name="vit_small_patch16_dinov3_qkvb",
            options=options,
            num_heads=described["adapter_heads"],
            stem_width=described["conv_inplane"],
            drop_path=0.0,
        ),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=width,
            mask_dim=width,
            num_heads=described["head_heads"],
            num_layers=described["encoder_layers"],
            feedforward_dim=described["encoder_ffn"],
        ),
        transformer_decoder=MaskedTransformerDecoderConfig(
            hidden_dim=width,
            num_heads=described["head_heads"],
            num_layers=described["decoder_layers"],
            feedforward_dim=described["decoder_ffn"],
            num_queries=described["num_queries"],
        ),
        num_classes=described["num_classes"],
    )


@pytest.fixture(scope="module")
def case(authors_goldens: Path):
    folder = authors_goldens / "dinov3_m2f" / "dinov3_adapter_m2f"
    files = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs", "outputs_float64"))
    return json.loads((folder / "case.json").read_text()), *files


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())


def loaded(described: dict, weights: dict[str, torch.Tensor], **changes: Any) -> Segmenter:
    model = build_model(replace(config_of(described["config"]), **changes), pretrained_backbone=False)
    report = load_weights(model, weights)
    assert report.complete, report
    assert report.unexpected == ()
    return model


def mask_logits(predictions: Predictions) -> torch.Tensor:
    """Return the mask logits [L, B, Q, H, W] of all layers in the dtype of the predictions."""
    return torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)


def maps_and_predictions(model: Segmenter, images: torch.Tensor) -> tuple[list[torch.Tensor], Predictions]:
    maps: list[torch.Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *args: maps.extend(args[2]))
    predictions = model(images)
    hook.remove()
    return maps, predictions


def test_the_adapter_equals_the_authors_code(case):
    described, weights, inputs, outputs, _ = case
    model, names = loaded(described, weights), ("eval", "train_no_drop_path")
    images = model.normalise(inputs["image_uint8"])
    for name in names:
        load_weights(model, weights)
        model.train(name != "eval").zero_grad()
        maps, predictions = maps_and_predictions(model, images)
        masks = mask_logits(predictions)
        scalar = sum(0.5 * found.square().mean(tuple(range(1, found.ndim))) for found in (masks, predictions[0])).sum()
        scalar.backward()
        found = {"scalar": scalar[None]} | {f"adapter_output{i}": level for i, level in enumerate(maps, 1)}
        found |= {f"mask_logits_layer{i}": logits for i, logits in enumerate(masks)}
        found |= {f"class_logits_layer{i}": logits for i, logits in enumerate(predictions.class_logits)}
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found |= {f"grad/{key}": gradient for key, gradient in to_dinov3_names(gradients).items()}
        buffers = to_dinov3_names(dict(model.state_dict()))
        found |= {
            f"{kind}_after/{key.removesuffix(f'.{kind}')}": tensor
            for key, tensor in buffers.items()
            if (kind := key.rpartition(".")[2]).startswith("running_")
        }
        compared = {key: tensor for key, tensor in outputs.items() if key.startswith(f"{name}/")}
        differences = {
            key: relative(found[own], tensor)
            for key, tensor in compared.items()
            if (own := key.removeprefix(f"{name}/")) in found
        }
        assert len(differences) >= (30 if name == "eval" else 20)
        assert max(differences.values()) <= 2e-5, differences
        for layer, one in enumerate(masks):
            if (key := f"{name}/attention_blocked_for_layer{layer}") in outputs:
                resized = F.interpolate(one, LEVELS[layer % 3], mode="bilinear", align_corners=False)
                assert torch.equal(resized.flatten(2).sigmoid() < 0.5, outputs[key].bool()), key


def test_maps_equal_the_authors_in_float64(case):
    described, weights, inputs, _, doubles = case
    model = loaded(described, weights).double().eval()
    with torch.no_grad():
        maps = model.backbone(model.normalise(inputs["image_uint8"]).double())
    worst = max(relative(maps[i], doubles[f"eval/adapter_output{i + 1}"]) for i in (1, 2, 3))
    assert worst <= 1e-6


def test_windows_of_an_image_of_any_size_equal_the_authors(case):
    described, weights, inputs, outputs, _ = case
    model, size = loaded(described, weights).eval(), (75, 90)
    window, stride = described["config"]["window"], described["config"]["stride"]
    geometry = ImageGeometry((window, window), (window, window), (window, window))
    class_logits = []

    def windows(images: torch.Tensor) -> Iterator[Window]:
        for area in (place.area for place in window_places(size, window, stride)):
            crop = images[..., area.top : area.bottom, area.left : area.right]
            with torch.no_grad():
                found = model(model.normalise(crop))
            class_logits.append(found.class_logits[-1])
            output = found.class_logits[-1, 0], found.mask_embeddings[-1, 0], found.mask_features[0]
            yield Window(area.top, area.left, ClassScores(*output, geometry, "class_scores"))

    images, tolerance = inputs["odd_image_uint8"], described["tolerance"]["slide_atol"]
    averaged = WindowScores(windows(images), size, size).at(slice(0, size[0]))
    assert len(class_logits) == described["slide"]["num_windows"]
    for index, logits in enumerate(class_logits):
        assert relative(logits, outputs[f"slide/window{index}_class_logits"]) <= 5e-5
    assert (averaged - outputs["slide/window_scores_averaged"][0].float()).abs().max() <= tolerance
    plain, mirrored = (
        WindowScores(windows(view), size, (40, 50)).at(slice(0, 40)) for view in (images, images.flip(-1))
    )
    mean = (plain.softmax(0) + mirrored.flip(-1).softmax(0)) / 2
    assert (mean - outputs["slide/probabilities_plain_and_flip_averaged"][0]).abs().max() <= tolerance


def test_imported_weights_are_exported_unchanged(case):
    described, weights, *_ = case
    out = to_dinov3_names(loaded(described, weights).state_dict())
    unused = {key for key in weights if key.endswith(("mask_token", "rope_embed.periods"))}
    assert out.keys() == weights.keys() - unused
    for key, tensor in out.items():
        mask = weights.get(f"{key}_mask")
        assert torch.equal(tensor, weights[key] if mask is None else weights[key] * mask), key


def test_head_only_file_keeps_the_transformer_weights_of_the_recipe(case, tmp_path):
    described, weights, *_ = case
    config = replace(config_of(described["config"]), freeze=("backbone.vit",))
    head = {key: tensor for key, tensor in weights.items() if not key.startswith(VIT)}
    torch.save(head, tmp_path / "head.pth")
    vit = {key.removeprefix(VIT): tensor for key, tensor in weights.items() if key.startswith(VIT)}
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"a head without a backbone.*set model\.backbone\.pretrained to true"):
        build_with_weights(replace(config, backbone=replace(config.backbone, pretrained=False)), tmp_path / "head.pth")
    own = replace(config, backbone=replace(config.backbone, weights=str(tmp_path / "vit.pth")))
    model, report = build_with_weights(own, tmp_path / "head.pth")
    assert report.complete
    assert report.head_alone
    assert "the file contains only a head" in str(report)
    whole = loaded(described, weights).state_dict()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in model.state_dict().items())


def test_published_head_has_the_expected_names_and_parameter_counts():
    width = 2048
    config = ModelConfig(
        backbone=ViTAdapterBackboneConfig(name="vit_7b_patch16_dinov3"),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=width, mask_dim=width, num_heads=16, feedforward_dim=4096
        ),
        transformer_decoder=MaskedTransformerDecoderConfig(hidden_dim=width, num_heads=16, feedforward_dim=4096),
        freeze=("backbone.vit",),
        num_classes=150,
    )
    with torch.device("meta"):
        model = build_model(config, pretrained_backbone=False)
    names = to_dinov3_names(model.state_dict())
    assert len([name for name in names if not name.startswith(VIT)]) == 479
    assert f"{VIT}blocks.0.mlp.w3.weight" in names
    require_dinov3(config)
    millions = {
        part: sum(p.numel() for p in model.get_submodule(part).parameters()) / 1e6
        for part in ("backbone.vit", "backbone", "pixel_decoder", "transformer_decoder")
    }
    assert millions["backbone.vit"] == pytest.approx(6716.0, abs=0.1)
    assert millions["backbone"] - millions["backbone.vit"] == pytest.approx(227.1, abs=0.1)
    assert millions["pixel_decoder"] == pytest.approx(233.7, abs=0.1)
    assert millions["transformer_decoder"] == pytest.approx(466.6, abs=0.1)
    with pytest.raises(WeightsError, match=r"pixel_decoder\.num_heads is 8; .* supports only 16"):
        require_dinov3(replace(config, pixel_decoder=replace(config.pixel_decoder, num_heads=8)))


def test_export_contains_the_tensors_of_the_published_file(tmp_path):
    config = ModelConfig(
        backbone=ViTAdapterBackboneConfig(
            name="vit_small_patch16_dinov3_qkvb", options={"embed_dim": 32, "depth": 4, "num_heads": 2}
        ),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=64, mask_dim=64, num_heads=16, feedforward_dim=4096),
        transformer_decoder=MaskedTransformerDecoderConfig(hidden_dim=64, num_heads=16, feedforward_dim=4096),
        freeze=("backbone.vit",),
        num_classes=5,
    )
    model = build_model(config, pretrained_backbone=False)
    write_official(model, config, tmp_path / "head.pth", {"notes": "of ours"})
    state = read_state(tmp_path / "head.pth")
    assert state.keys() == torch.load(tmp_path / "head.pth", weights_only=True).keys()
    assert len(state) == 479
    assert is_head_alone(state)
    again = build_model(config, pretrained_backbone=False)
    report = load_weights(again, state)
    assert {name.split(".")[1] for name in report.missing} == {"vit"}
    assert all(torch.equal(again.state_dict()[name], model.state_dict()[name]) for name in report.loaded)
    whole = replace(config, freeze=())
    write_official(model, whole, tmp_path / "whole.pth")
    assert load_weights(again, tmp_path / "whole.pth").complete


def test_frozen_transformer_is_excluded_from_training_and_unchanged(case):
    described, weights, inputs, *_ = case
    model = loaded(described, weights, freeze=("backbone.vit",)).train()
    before = {name: tensor.clone() for name, tensor in model.backbone.vit.state_dict().items()}
    kept: list[torch.Size] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor)
    with hooks:
        layers, _, _ = model.backbone.vit.levels(model.normalise(inputs["image_uint8"]), (0, 1, 2, 3))
    assert kept == []
    assert not any(layer.requires_grad for layer in layers)
    optimizer = torch.optim.AdamW(build_param_groups(model, OptimizerConfig()))
    predictions = model(model.normalise(inputs["image_uint8"]))
    (predictions.class_logits.square().sum() + mask_logits(predictions).square().sum()).backward()
    optimizer.step()
    frozen, held = set(model.backbone.vit.parameters()), optimizer.param_groups
    assert not any(parameter in frozen for group in held for parameter in group["params"])
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("backbone.vit.")
        assert (parameter.grad is None, parameter.requires_grad) == (is_frozen, not is_frozen), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.vit.state_dict().items())
    assert not model.backbone.vit.training
    assert model.backbone.prior.training


def test_images_of_any_size_are_padded_to_32(case):
    described, weights, inputs, *_ = case
    model = loaded(described, weights).eval()
    images = model.normalise(inputs["odd_image_uint8"])
    with torch.no_grad():
        maps, padded = model.backbone(images), model.backbone(F.pad(images, (0, 6, 0, 21)))
    assert [tuple(level.shape[-2:]) for level in maps] == [(19, 23), (10, 12), (5, 6), (3, 3)]
    assert all(
        torch.equal(level, whole[..., : level.shape[-2], : level.shape[-1]])
        for level, whole in zip(maps, padded, strict=True)
    )


@pytest.mark.parametrize("size", [(48, 80), (75, 90), (30, 30), (640, 481)])
def test_head_accepts_images_of_any_size(size):
    parts = {"num_layers": 1, "num_heads": 2, "feedforward_dim": 16}
    config = ModelConfig(
        backbone=ViTAdapterBackboneConfig(
            options={"embed_dim": 32, "depth": 4, "num_heads": 2}, num_heads=4, stem_width=4
        ),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(conv_dim=16, mask_dim=16, **parts),
        transformer_decoder=MaskedTransformerDecoderConfig(hidden_dim=16, num_queries=4, **parts),
        num_classes=3,
    )
    model = build_model(config, pretrained_backbone=False).eval()
    with torch.no_grad():
        found = model(torch.randn(1, 3, *size))
    assert found.mask_features.shape[2:] == tuple(-(-side // 4) for side in size)
    assert found.class_logits.isfinite().all()
    assert found.mask_logits().isfinite().all()


def test_drop_path_acts_only_in_training(case):
    described, weights, inputs, *_ = case
    config = config_of(described["config"])
    model = loaded(described, weights, backbone=replace(config.backbone, drop_path=0.5))
    images = model.normalise(inputs["image_uint8"])

    def maps(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.backbone(images)[1]

    model.eval()
    assert torch.equal(maps(0), maps(1))
    model.backbone.train()
    assert torch.equal(maps(0), maps(0))
    assert not torch.equal(maps(0), maps(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "reads 4 blocks, but this has only 3; choose a deeper transformer"),
        ({"patch_size": 14}, "needs patches of 16 pixels"),
        ({"embed_dim": 48, "num_heads": 3}, r"its 48 channels must be a multiple of 4 .*num_heads \(16\)"),
    ],
)
def test_unsupported_transformers_are_refused(options, message):
    small = {"embed_dim": 32, "depth": 4, "num_heads": 2} | options
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_backbone(ViTAdapterBackboneConfig(options=small), pretrained=False)


@pytest.mark.parametrize(("depth", "layers"), [(4, (0, 1, 2, 3)), (5, (0, 1, 2, 4)), (6, (0, 2, 3, 5))])
def test_adapter_reads_the_last_block_of_each_quarter_at_any_depth(depth, layers):
    config = ViTAdapterBackboneConfig(
        options={"embed_dim": 32, "depth": depth, "num_heads": 2}, num_heads=4, stem_width=4
    )
    backbone = build_backbone(config, pretrained=False).eval()
    assert backbone.layers == layers
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 32, 64))
    assert [tuple(level.shape[1:]) for level in maps] == [(32, 8, 16), (32, 4, 8), (32, 2, 4), (32, 1, 2)]


def test_adapter_reads_the_blocks_of_dinov3():
    assert [extraction_layers(depth) for depth in (12, 24, 40)] == [(2, 5, 8, 11), (4, 11, 17, 23), (9, 19, 29, 39)]


def test_freezing_backbone_vit_requires_the_adapter():
    with pytest.raises(ConfigError, match=r"freeze has backbone\.vit, which backbone\.kind timm does not have"):
        ModelConfig(freeze=("backbone.vit",))
