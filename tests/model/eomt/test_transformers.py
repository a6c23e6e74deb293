"""EoMT with random weights against `eomt` and `eomt_dinov3` of `transformers`; name conversion; and losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from m2f.model.config import (
    EomtDecoderConfig,
    LossConfig,
    ModelConfig,
    TimmBackboneConfig,
    UpscalePixelDecoderConfig,
)
from m2f.model.loss.criterion import compute_losses, count_normalizers
from m2f.model.loss.points import GivenPoints
from m2f.model.mask2former import build_model
from m2f.model.structures import Predictions, Targets
from m2f.model.weights.eomt import eomt_to_authors, eomt_to_transformers
from m2f.model.weights.load import load_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
SIZES |= {"num_blocks": 2, "num_queries": 6, "num_register_tokens": 4, "num_labels": 5, "num_upscale_blocks": 2}
OPTIONS = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "init_values": 1.0}
FAMILIES = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "giant": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 5.5}),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {"mlp_ratio": 2.0}),
}


def reference_model(family: str, attention: str = "sdpa") -> transformers.PreTrainedModel:
    common = {**SIZES, "layerscale_value": 1.0, "attn_implementation": attention}
    if family == "dinov3":
        config = transformers.EomtDinov3Config(**common, intermediate_size=64, layer_norm_eps=1e-5)
        model = transformers.EomtDinov3ForUniversalSegmentation(config)
    else:
        config = transformers.EomtConfig(**common, mlp_ratio=4, use_swiglu_ffn=family == "giant")
        model = transformers.EomtForUniversalSegmentation(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bias", "token", "position")):
                parameter.normal_(0, 0.3)
    return model


def our_model(family: str) -> torch.nn.Module:
    name, options = FAMILIES[family]
    config = ModelConfig(
        backbone=TimmBackboneConfig(name=name, features="tokens", options=OPTIONS | options),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=6, num_layers=2),
        num_classes=5,
    )
    return build_model(config, pretrained_backbone=False)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_transformers(family, masked, dtype):
    torch.manual_seed(1)
    # The masks of transformers are float32. In float64 only eager attention accepts them, with a float32 softmax.
    attention = "eager" if masked and dtype == torch.float64 else "sdpa"
    theirs, ours = reference_model(family, attention).to(dtype).eval(), our_model(family).to(dtype).eval()
    theirs.attn_mask_probs.fill_(float(masked))
    report = load_weights(ours, theirs.state_dict())
    assert report.complete
    assert not report.unexpected
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    expected, found = theirs(images), ours(images)
    masks = torch.einsum("bqc,bchw->bqhw", found.mask_embeddings[-1], found.mask_features)
    pairs = [(found.class_logits[-1], expected.class_queries_logits), (masks, expected.masks_queries_logits)]
    for classes, mask_logits in zip(*pairs, strict=True):
        (classes.square().mean() + mask_logits.square().mean()).backward()
    gradients = eomt_to_transformers({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    # A key bias has no effect on the outputs, so its gradient is only rounding error.
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and "k_proj.bias" not in name}
    pairs += [(gradients[name], gradient) for name, gradient in named.items()]
    assert len(pairs) > 60
    exact = 1e-7 if family == "dinov3" else 1e-10  # rotary angles are float32 in both
    limit = 1e-5 if dtype == torch.float32 else exact if attention == "sdpa" else 1e-6
    assert max(relative(*pair) for pair in pairs) <= limit


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_weights_load_back_unchanged(family):
    theirs, ours = reference_model(family), our_model(family)
    load_weights(ours, theirs.state_dict())
    own = ours.state_dict()
    published = {name: tensor for name, tensor in theirs.state_dict().items() if name != "criterion.empty_weight"}
    written = eomt_to_transformers(own)
    assert {name: tensor.tolist() for name, tensor in written.items()} == {
        name: tensor.tolist() for name, tensor in published.items()
    }
    again = our_model(family)
    assert load_weights(again, eomt_to_authors(own)).complete
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_added_only_to_the_backbone(family):
    base, trained, again = our_model(family), our_model(family), our_model(family)
    again.backbone.load_state_dict(base.backbone.state_dict())
    state = trained.state_dict()
    published = {
        name: tensor - base.state_dict()[name] if name.startswith("backbone.") else tensor
        for name, tensor in state.items()
    }
    assert load_weights(again, eomt_to_authors(published), deltas=True).complete
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)


def test_file_without_mask_probabilities_loads_as_finished_training():
    state, ours = reference_model("dinov2").state_dict(), our_model("dinov2")
    del state["attn_mask_probs"]
    assert load_weights(ours, state).complete
    assert ours.transformer_decoder.probabilities == (0.0, 0.0)


def test_losses_matching_and_gradients_equal_the_authors(authors_goldens: Path):
    folder = authors_goldens / "eomt" / "loss_dinov2_patch14"
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    layers, counts = range(3), (3, 2)
    masks = [inputs[f"mask_logits_layer{layer}"].requires_grad_() for layer in layers]
    classes = [inputs[f"class_logits_layer{layer}"].requires_grad_() for layer in layers]
    # Mask logits are products of embeddings and features; with unit embeddings they equal the features.
    embeddings = torch.eye(6).expand(3, 2, -1, -1)
    predictions = Predictions(torch.stack(classes), embeddings, masks[-1], tuple(masks[:-1]))
    targets = _targets(inputs)
    config = LossConfig(num_points=48)
    losses = compute_losses(
        predictions, targets, _points(inputs, outputs), count_normalizers(targets, 6, config), config, 5
    )
    expected = torch.stack(
        [
            torch.stack([outputs[f"loss_{term}_layer{layer}"][0] for term in ("cross_entropy", "mask", "dice")])
            for layer in layers
        ]
    )
    weights = torch.tensor([2.0, 5.0, 5.0])
    total = outputs["loss_total"][0]
    terms = expected if torch.isclose(expected.sum(), total, rtol=1e-4) else expected * weights
    torch.testing.assert_close(losses.terms, terms, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(losses.total, total, rtol=2e-5, atol=0)
    losses.total.backward()
    for layer in layers:
        assert relative(classes[layer].grad, outputs[f"grad/class_logits_layer{layer}"]) <= 2e-5
        assert relative(masks[layer].grad, outputs[f"grad/mask_logits_layer{layer}"]) <= 2e-5
    assert sum(counts) == int(targets.valid.sum())


def _targets(inputs: dict[str, torch.Tensor]) -> Targets:
    """Return targets with overlapping masks, each in its own layer."""
    id_maps = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    labels, valid = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)
    for image in range(2):
        count = len(inputs[f"labels_image{image}"])
        id_maps[image, :count] = inputs[f"masks_image{image}"]
        labels[image, :count] = inputs[f"labels_image{image}"]
        valid[image, :count] = True
    layer = torch.arange(3).expand(2, -1).contiguous()
    position = torch.arange(2)
    return Targets(id_maps, labels, layer, torch.ones_like(layer), valid, torch.ones(2), position, position)


def _points(inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> GivenPoints:
    """Return the authors' random points, reordered by image and target.

    The authors concatenate the masks of all images, in the order of the matched queries within an image.
    """
    matching, candidates, fresh = [], torch.zeros(3, 2, 3, 144, 2), torch.zeros(3, 2, 3, 12, 2)
    for layer in range(3):
        first, second, wide, narrow = (inputs[f"random_draw_layer{layer}_{i}"] for i in range(4))
        matching.append(torch.cat([first, second]))
        for image, rows in enumerate((slice(0, 3), slice(3, 5))):
            order = outputs[f"matched_targets_layer{layer}_image{image}"]
            candidates[layer, image, order], fresh[layer, image, order] = wide[rows], narrow[rows]
    return GivenPoints(torch.stack(matching), candidates, fresh)
