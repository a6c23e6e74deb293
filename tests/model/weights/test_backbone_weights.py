"""`model.backbone.weights`: the backbones of whole models, and DINOv2 and DINOv3 of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from m2f.model.backbones.build import build_backbone
from m2f.model.config import (
    BackboneConfig,
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PmtDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    UpscalePixelDecoderConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.export.graphs import export_hugging_face
from m2f.model.mask2former import build_model
from m2f.model.weights.files import read_names, read_state
from m2f.model.weights.load import load_weights
from m2f.model.weights.names import to_dinov3_names, to_hugging_face_names, to_official_names

DINOV3, DINOV2 = "vit_small_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"
SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "init_values": 1.0}
TOKENS = TimmBackboneConfig(name=DINOV3, features="tokens", options=SMALL)
MAPS = replace(TOKENS, features="maps")
ADAPTER = ViTAdapterBackboneConfig(name=DINOV3, num_heads=8, options=SMALL)
RESNET = TimmBackboneConfig(name="resnet50", options={"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8)})
SWIN = SwinBackboneConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
EOMT = EomtDecoderConfig(num_queries=5, num_layers=2)


def model_of(backbone: BackboneConfig, decoder: EomtDecoderConfig | PmtDecoderConfig | None = None):
    queries = MaskedTransformerDecoderConfig(
        num_queries=5, num_layers=2, hidden_dim=32, num_heads=2, feedforward_dim=48
    )
    maps = MSDeformAttnPixelDecoderConfig(conv_dim=32, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=40)
    config = ModelConfig(
        backbone=backbone,
        pixel_decoder=UpscalePixelDecoderConfig() if decoder else maps,
        transformer_decoder=decoder or queries,
        num_classes=3,
    )
    return randomised(build_model(config, pretrained_backbone=False)), config


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith((".weight", ".bias", ".running_mean", ".running_var")) or isinstance(tensor, nn.Parameter):
                tensor.normal_(std=0.2).abs_()
    return module.eval()


def assert_equal_states(found: nn.Module, expected: nn.Module):
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor) or name.endswith("num_batches_tracked"), name


# Vision transformers of transformers


def transformers_vit(**settings):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.DINOv3ViTConfig(**(shape | {"num_register_tokens": 4, "image_size": 64} | settings))
    return randomised(transformers.DINOv3ViTModel(config))


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        (DINOV3, {}, {}),
        (DINOV3, {"num_hidden_layers": 8}, {"depth": 8}),
        ("vit_small_plus_patch16_dinov3_qkvb", {"use_gated_mlp": True, "hidden_act": "silu"}, {"swiglu_align_to": 8}),
        ("vit_small_patch16_dinov3", {"query_bias": False, "value_bias": False}, {}),
    ],
    ids=["plain", "deep", "gated", "no bias"],
)
def test_dinov3_of_transformers_gives_the_same_tokens(name, settings, options, tmp_path):
    theirs = transformers_vit(**settings)
    theirs.save_pretrained(tmp_path)
    config = replace(TOKENS, name=name, options=SMALL | options, weights=str(tmp_path))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    ours = build_backbone(config).eval()
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_of_transformers_gives_the_same_tokens(gated, tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, use_swiglu_ffn=gated
    )
    theirs = randomised(transformers.Dinov2WithRegistersModel(config))
    theirs.save_pretrained(tmp_path)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56, "patch_size": 14}
    ours = TimmBackboneConfig(
        name="vit_giant_patch14_reg4_dinov2" if gated else DINOV2,
        features="tokens",
        options=options | {"mlp_ratio": 5.5 if gated else 4.0},
        weights=str(tmp_path),
    )
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = build_backbone(ours).eval()(images)
        torch.testing.assert_close(found, theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_dinov3_of_transformers_starts_every_kind_of_backbone(tmp_path):
    theirs = transformers_vit()
    theirs.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "in_memory.safetensors")
    tokens = build_backbone(replace(TOKENS, weights=str(tmp_path)))
    assert_equal_states(build_backbone(replace(TOKENS, weights=str(tmp_path / "in_memory.safetensors"))), tokens)
    assert_equal_states(build_backbone(replace(ADAPTER, weights=str(tmp_path))).vit, tokens)
    assert torch.equal(
        build_backbone(replace(MAPS, weights=str(tmp_path))).body.model.reg_token, tokens.embed.reg_token
    )
    model, _ = model_of(TOKENS, EOMT)
    report = load_weights(model, tmp_path)
    assert not report.unexpected
    assert_equal_states(model.backbone, tokens)


def test_dinov3_of_transformers_with_other_layers_is_refused_by_name(tmp_path):
    transformers_vit(num_hidden_layers=5).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit .*Unexpected key.*blocks\.4\..*set model\.backbone \(name"):
        build_backbone(replace(TOKENS, weights=str(tmp_path)))


# Backbones of whole models


@pytest.mark.parametrize("name", [DINOV3, DINOV2])
def test_a_transformer_moves_between_tokens_maps_and_adapter(name, tmp_path):
    options = SMALL if name == DINOV3 else SMALL | {"img_size": 64}
    kinds = [replace(kind, name=name, options=options) for kind in (TOKENS, MAPS, ADAPTER)]
    images = torch.randn(1, 3, 64, 64)
    states = []
    for index, kind in enumerate(kinds):
        model, _ = model_of(kind, EOMT if kind.kind == "timm" and kind.features == "tokens" else None)
        save_file(model.state_dict(), tmp_path / f"{index}.safetensors")
        states.append(model.backbone)
    for index, source in enumerate(states):
        weights = str(tmp_path / f"{index}.safetensors")
        tokens, maps, adapter = (build_backbone(replace(kind, weights=weights)).eval() for kind in kinds)
        assert_equal_states(adapter.vit, tokens)
        assert_equal_states((tokens, maps, adapter)[index], source)
        with torch.no_grad():
            norm = tokens(images)[:, tokens.embed.prefix :]
            (features,) = maps.body.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), norm, rtol=1e-4, atol=1e-5)


def test_the_backbone_of_an_eomt_starts_a_pmt_from_every_layout(tmp_path):
    model, config = model_of(TOKENS, EOMT)
    checkpoint, folder = tmp_path / "step_00000010", tmp_path / "hugging_face"
    checkpoint.mkdir()
    save_file(model.state_dict(), checkpoint / "weights.safetensors")
    export_hugging_face(model, config, folder, ["cat", "dog", "sky"], shortest_edge=64, max_size=64)
    decoder = PmtDecoderConfig(num_queries=5, num_layers=2)
    for weights in (checkpoint, checkpoint / "weights.safetensors", folder):
        settings = replace(config, transformer_decoder=decoder, backbone=replace(TOKENS, weights=str(weights)))
        assert_equal_states(build_model(replace(settings, freeze=("backbone",))).backbone, model.backbone)


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
def test_the_backbone_of_a_mask2former_starts_another_from_every_layout(backbone, tmp_path):
    model, _ = model_of(backbone)
    own = model.state_dict()
    for layout in (own, to_official_names(own), to_hugging_face_names(own)):
        torch.save({"model": layout}, tmp_path / "weights.pth")
        assert_equal_states(build_backbone(replace(backbone, weights=str(tmp_path / "weights.pth"))), model.backbone)


def test_a_whole_file_of_dinov3_starts_a_backbone_and_a_head_alone_does_not(tmp_path):
    model, _ = model_of(ADAPTER)
    names = to_dinov3_names(model.state_dict())
    torch.save(names, tmp_path / "whole.pth")
    assert_equal_states(build_backbone(replace(ADAPTER, weights=str(tmp_path / "whole.pth"))), model.backbone)
    head = {name: tensor for name, tensor in names.items() if not name.startswith("segmentation_model.0.")}
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=r"head\.pth contains a model without a backbone; set model\.weights to it"):
        build_backbone(replace(ADAPTER, weights=str(tmp_path / "head.pth")))


def test_a_group_norm_takes_the_gains_of_batch_norms_but_not_the_reverse(tmp_path):
    for norm in ("frozen_batch", "group"):
        save_file(model_of(replace(RESNET, norm=norm))[0].state_dict(), tmp_path / f"{norm}.safetensors")
    group = build_backbone(replace(RESNET, norm="group", weights=str(tmp_path / "frozen_batch.safetensors")))
    assert torch.equal(
        group.state_dict()["body.layer1.0.bn1.weight"],
        read_state(tmp_path / "frozen_batch.safetensors")["backbone.body.layer1.0.bn1.weight"],
    )
    with pytest.raises(
        ConfigError, match=r"missing: .*running_mean.*set model\.backbone \(kind, name, norm, options\)"
    ):
        build_backbone(replace(RESNET, weights=str(tmp_path / "group.safetensors")))


def test_learned_positions_are_interpolated_to_another_grid(tmp_path):
    small, large = (
        replace(TOKENS, name=DINOV2, options=SMALL | {"img_size": size}, weights=weights)
        for size, weights in ((64, None), (96, str(tmp_path / "weights.safetensors")))
    )
    model, _ = model_of(small, EOMT)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    images, loaded = torch.randn(1, 3, 96, 96), build_backbone(large).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.backbone(images))


@pytest.mark.parametrize(
    ("backbone", "named"),
    [
        (replace(TOKENS, options=SMALL | {"depth": 8}), ["missing: backbone.blocks.4", "and", "more"]),
        (replace(TOKENS, options=SMALL | {"depth": 3}), ["unexpected: backbone.blocks.3"]),
        (
            replace(TOKENS, options=SMALL | {"mlp_ratio": 4.0}),
            ["backbone.blocks.0.mlp.fc1.bias (file (64,), model (128,))"],
        ),
        (RESNET, ["missing: backbone.body.conv1.weight", "unexpected: backbone.blocks.0"]),
        (replace(ADAPTER, name=DINOV2), ["missing: backbone.vit.embed.pos_embed"]),
    ],
    ids=["deeper", "shallower", "wider", "resnet", "dinov2"],
)
def test_another_backbone_is_refused_in_one_message_that_names_the_tensors(backbone, named, tmp_path):
    weights = str(tmp_path / "weights.safetensors")
    save_file(model_of(TOKENS, EOMT)[0].state_dict(), weights)
    with pytest.raises(
        ConfigError, match=r"a model with another backbone than the recipe's .*; set model\.backbone"
    ) as raised:
        build_backbone(replace(backbone, weights=weights))
    for part in named:
        assert part in str(raised.value), str(raised.value)


def test_names_are_read_without_the_tensors(tmp_path):
    state = {"a.weight": torch.zeros(2), "b": torch.ones(1)}
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"model": state}, tmp_path / "weights.pth")
    for path in (tmp_path, tmp_path / "weights.safetensors", tmp_path / "weights.pth"):
        assert sorted(read_names(path)) == sorted(state)
