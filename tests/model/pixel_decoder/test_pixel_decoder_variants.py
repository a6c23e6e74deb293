"""Guarantees of every pixel decoder: shapes, gradients, precision, initialisation and cost."""

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    MSDeformAttnPixelDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.pixel_decoder import build_pixel_decoder

CHANNELS = (8, 12, 16, 20)
RESNET50, SWIN_L = (256, 512, 1024, 2048), (192, 384, 768, 1536)
WIDTH = {"conv_dim": 32, "mask_dim": 24}
ENCODER = {"num_layers": 2, "num_heads": 4, "feedforward_dim": 48, "dropout": 0.0}
SMALL = [
    MSDeformAttnPixelDecoderConfig(**WIDTH, **ENCODER),
    FPNPixelDecoderConfig(**WIDTH),
    SemanticFPNPixelDecoderConfig(**WIDTH),
    BiFPNPixelDecoderConfig(**WIDTH, num_layers=2),
    FaPNPixelDecoderConfig(**WIDTH, offset_groups=4),
    TransformerFPNPixelDecoderConfig(**WIDTH, **ENCODER),
]
SIZES = {
    "multiples of 32": [(16, 24), (8, 12), (4, 6), (2, 3)],
    "odd, rounded up": [(13, 19), (7, 10), (4, 5), (2, 3)],
    "odd, rounded down": [(13, 19), (6, 9), (3, 4), (1, 2)],
}

every_decoder = pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)


def random_maps(sizes, batch=2):
    return [torch.randn(batch, width, *size) for width, size in zip(CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@every_decoder
def test_maps_keep_their_sizes_and_come_coarsest_first(config, sizes):
    decoder = build_pixel_decoder(config, CHANNELS)
    assert (decoder.feature_dim, decoder.mask_dim) == (32, 24)
    mask_features, features = decoder(random_maps(sizes))
    assert mask_features.shape == (2, 24, *sizes[0])
    assert [level.shape for level in features] == [(2, 32, *size) for size in sizes[:0:-1]]


@every_decoder
def test_every_parameter_and_every_input_gets_a_gradient(config):
    torch.manual_seed(0)
    decoder = build_pixel_decoder(config, CHANNELS)
    with torch.no_grad():
        for parameter in decoder.parameters():  # zero initial weights of offsets and attention would block gradients
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = [level.requires_grad_() for level in random_maps(SIZES["odd, rounded up"])]
    mask_features, features = decoder(inputs)
    sum(output.square().mean() for output in (mask_features, *features)).backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert all(level.grad.abs().max() > 0 for level in inputs)


@every_decoder
def test_every_parameter_gets_a_gradient_where_only_mask_features_are_used(config):
    decoder = build_pixel_decoder(config, CHANNELS)
    decoder(random_maps(SIZES["odd, rounded down"]))[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
@every_decoder
def test_bfloat16_is_close_to_float32_forward_and_runs_backward(config, mode):
    torch.manual_seed(0)
    decoder = build_pixel_decoder(config, CHANNELS)
    maps = random_maps(SIZES["multiples of 32"])
    exact = decoder(maps)[0].detach()
    if mode == "parameters":
        decoder, maps = decoder.bfloat16(), [level.bfloat16() for level in maps]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        mask_features, features = decoder(maps)
    assert (mask_features.float() - exact).abs().max() < 0.06 * exact.abs().max()
    sum(output.float().mean() for output in (mask_features, *features)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())


@every_decoder
def test_initialisation_is_determined_by_the_seed(config):
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(build_pixel_decoder(config, CHANNELS).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("config", SMALL[1:], ids=lambda config: config.kind)
def test_convolutions_have_the_official_initialisation_and_no_bias(config):
    torch.manual_seed(0)
    decoder = build_pixel_decoder(config, CHANNELS)
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.endswith("alignment.offsets"):
            bound = (3 / module.weight[0].numel()) ** 0.5
            assert 0.9 * bound < module.weight.abs().max().item() <= bound * (1 + 1e-6), name
            assert module.bias is None or not module.bias.any(), name


def convolution_parameters(inputs, outputs, kernel, norm=True):
    """Return the parameter count of a convolution with GroupNorm instead of a bias, or with a bias."""
    return inputs * outputs * kernel**2 + (2 * outputs if norm else outputs)


def expected_parameters(kind, channels, dim=256):
    smooth = convolution_parameters(dim, dim, 3)
    mask_features = convolution_parameters(dim, dim, 3, norm=False)
    laterals = [convolution_parameters(width, dim, 1) for width in channels]
    fpn = sum(laterals[:3]) + 3 * smooth + convolution_parameters(channels[3], dim, 3)
    match kind:
        case "fpn":
            return fpn + mask_features
        case "semantic_fpn":
            return fpn + (1 + 1 + 2 + 3) * smooth + mask_features
        case "bifpn":
            node = dim * 9 + dim * dim + 2 * dim
            return sum(laterals) + 3 * (6 * node + 2 + 2 + 2 + 3 + 3 + 2) + 4 * smooth + mask_features
        case "fapn":
            selections = sum(width * width + width * dim for width in channels[:3])
            offsets = convolution_parameters(dim, 8 * 3 * 9, 3, norm=False)
            step = convolution_parameters(2 * dim, dim, 1) + offsets + mask_features + smooth
            return laterals[3] + selections + 3 * step + mask_features
        case "transformer_fpn":
            attention = 4 * (dim * dim + dim)
            encoder_layer = attention + 2 * dim * 2048 + 2048 + dim + 2 * 2 * dim
            with_encoded = fpn - convolution_parameters(channels[3], dim, 3) + smooth
            project = convolution_parameters(channels[3], dim, 1, norm=False)
            return project + 6 * encoder_layer + with_encoded + mask_features


def full_size(config, channels):
    with torch.device("meta"):
        return build_pixel_decoder(type(config)(), channels)


@pytest.mark.parametrize("config", SMALL[1:], ids=lambda config: config.kind)
def test_parameter_counts_equal_hand_computed_values(config):
    decoder = full_size(config, RESNET50)
    assert sum(p.numel() for p in decoder.parameters()) == expected_parameters(config.kind, RESNET50)


def test_swin_l_with_fapn_has_the_parameter_count_of_the_paper():
    # Table V: 215M with deformable attention, 217M with FaPN.
    default, fapn = (
        sum(p.numel() for p in full_size(config, SWIN_L).parameters())
        for config in (MSDeformAttnPixelDecoderConfig(), FaPNPixelDecoderConfig())
    )
    assert 1.5e6 < fapn - default < 2.5e6


@pytest.mark.parametrize(
    ("config", "paper", "tolerance"), [(SMALL[1], 195, 0.04), (SMALL[2], 258, 0.03), (SMALL[3], 204, 0.01)]
)
def test_multiply_adds_equal_those_of_the_paper(config, paper, tolerance):
    # Table 4e gives means over COCO images, equal to 800 x 1131 pixels; 226G with deformable attention.
    giga_pixels = [800 * 1131 / stride**2 / 1e9 for stride in (4, 8, 16, 32)]
    default = 256 * (256 + 9 * 256 + 256) * giga_pixels[0]
    for channels, pixels in zip(RESNET50[1:], giga_pixels[1:], strict=True):
        default += (256 * channels + 6 * 729_088) * pixels
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder = build_pixel_decoder(type(config)(), RESNET50)
        decoder([torch.empty(1, width, 800 // s, 1120 // s) for width, s in zip(RESNET50, (4, 8, 16, 32), strict=True)])
    executed = counter.get_total_flops() / 2 / 1e9 * 1131 / 1120
    assert 226 - default + executed == pytest.approx(paper, rel=tolerance)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SMALL[0], {"conv_dim": 60, "num_heads": 8}, "conv_dim is 60; it must be a multiple of 4 and num_heads (8)"),
        (SMALL[5], {"conv_dim": 30, "num_heads": 3}, "conv_dim is 30; it must be a multiple of 4 and num_heads (3)"),
        (SMALL[4], {"conv_dim": 36, "offset_groups": 8}, "conv_dim is 36; it must be a multiple of offset_groups (8)"),
        (SMALL[3], {"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        (SMALL[1], {"mask_dim": 0}, "mask_dim is 0; it must be at least 1"),
    ],
)
def test_invalid_widths_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(config, **changes)
