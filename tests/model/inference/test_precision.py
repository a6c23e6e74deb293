"""Inference in bfloat16 with weights cast once is bit-identical to autocast."""

from copy import deepcopy

import pytest
import torch

from m2f.model.config import (
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.inference.precision import set_precision
from m2f.model.mask2former import build_model

SIZES = {"conv_dim": 32, "mask_dim": 32}
MODELS = {
    "resnet, deformable": (
        TimmBackboneConfig(name="resnet18", pretrained=False),
        MSDeformAttnPixelDecoderConfig(**SIZES, num_heads=4, num_layers=2, feedforward_dim=32),
    ),
    "swin, fpn": (
        SwinBackboneConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
        FPNPixelDecoderConfig(**SIZES),
    ),
    "resnet, transformer fpn": (
        TimmBackboneConfig(name="resnet18", pretrained=False),
        TransformerFPNPixelDecoderConfig(**SIZES, num_heads=4, num_layers=2, feedforward_dim=32),
    ),
}


def build(name):
    backbone, pixel_decoder = MODELS[name]
    decoder = MaskedTransformerDecoderConfig(
        hidden_dim=32, num_heads=4, num_queries=5, num_layers=3, feedforward_dim=32
    )
    config = ModelConfig(num_classes=3, backbone=backbone, pixel_decoder=pixel_decoder, transformer_decoder=decoder)
    torch.manual_seed(0)
    return build_model(config, pretrained_backbone=False).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_cast_in_advance_give_the_bits_of_autocast(name):
    model, images = build(name), torch.randn(1, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
    cast = deepcopy(model)
    set_precision(cast, "bf16")
    found = cast(images)
    assert found.class_logits.dtype == torch.float32
    assert torch.equal(found.class_logits, expected.class_logits.float())
    assert torch.equal(found.mask_logits(), expected.mask_logits())
    kept = {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float32}
    assert not any(name.startswith("transformer_decoder.layers.0.linear") for name in kept)
    assert all(parameter.dtype == torch.float32 for name, parameter in cast.named_parameters() if "norm" in name)


@torch.no_grad()
def test_fp32_changes_nothing():
    model, images = build("swin, fpn"), torch.randn(1, 3, 64, 96)
    expected = model(images)
    set_precision(model, "fp32")
    found = model(images)
    assert torch.equal(found.class_logits, expected.class_logits)
    assert torch.equal(found.mask_logits(), expected.mask_logits())
