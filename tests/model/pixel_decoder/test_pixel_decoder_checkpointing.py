"""Checkpointing of pixel decoders: encoder layers recompute their activations in the backward pass."""

from dataclasses import replace

import pytest
import torch

from m2f.model.config import MSDeformAttnPixelDecoderConfig, TransformerFPNPixelDecoderConfig
from m2f.model.pixel_decoder import build_pixel_decoder

CHANNELS = (8, 12, 16, 20)
SIZES = ((13, 19), (7, 10), (4, 5), (2, 3))
SMALL = {"conv_dim": 16, "mask_dim": 12, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.2}
CONFIGS = (MSDeformAttnPixelDecoderConfig(**SMALL), TransformerFPNPixelDecoderConfig(**SMALL))


def step_of(config, autocast):
    """Return mask features, all gradients and the number of values kept for the backward pass."""
    torch.manual_seed(0)
    decoder = build_pixel_decoder(config, CHANNELS)
    maps = [torch.randn(2, width, *size, requires_grad=True) for width, size in zip(CHANNELS, SIZES, strict=True)]
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        mask_features, levels = decoder(maps)
    sum(output.float().square().sum() for output in (mask_features, *levels)).backward()
    return mask_features, [tensor.grad for tensor in (*decoder.parameters(), *maps)], sum(kept)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_checkpointing_saves_memory_and_is_bit_identical_with_dropout(config, autocast):
    output, gradients, kept = step_of(config, autocast)
    again, recomputed, kept_less = step_of(replace(config, checkpointing=True), autocast)
    assert kept_less < kept
    assert torch.equal(again, output)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients, strict=True))
