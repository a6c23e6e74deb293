"""Pixel decoders against independent implementations and slow references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.maskformer.modeling_maskformer import MaskFormerPixelDecoder

from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.pixel_decoder import build_pixel_decoder
from m2f.model.pixel_decoder.bifpn import WeightedFusion
from m2f.model.pixel_decoder.fapn import AlignedStep, FeatureAlignment
from m2f.model.position_encoding import sine_position_embedding

CHANNELS = (8, 12, 16, 20)
WIDTH = {"conv_dim": 32, "mask_dim": 24}
ODD, EVEN = [(13, 19), (7, 10), (4, 5), (2, 3)], [(16, 24), (8, 12), (4, 6), (2, 3)]


def built(config):
    """Return a float64 decoder in which noise on all parameters replaces neutral initial values."""
    torch.manual_seed(0)
    return perturbed(build_pixel_decoder(config, CHANNELS))


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()


def random_maps(sizes):
    return [torch.randn(2, width, *size, dtype=torch.float64) for width, size in zip(CHANNELS, sizes, strict=True)]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_fpn_equals_the_independent_implementation_and_its_gradients():
    decoder = built(FPNPixelDecoderConfig(**WIDTH))
    twin = MaskFormerPixelDecoder(
        in_features=CHANNELS[3], lateral_widths=list(CHANNELS[:3]), feature_size=32, mask_feature_size=24
    ).double()
    renamed = {
        name.replace("fpn.top", "fpn.stem")
        .replace("fpn.steps", "fpn.layers")
        .replace(".lateral.", ".proj.")
        .replace(".output.", ".block.")
        .replace("mask_features", "mask_projection"): value
        for name, value in decoder.state_dict().items()
    }
    twin.load_state_dict(renamed)
    maps = [level.requires_grad_() for level in random_maps(ODD)]
    mask_features, features = decoder(maps)
    expected = twin(maps, output_hidden_states=True)
    assert_equal(mask_features, expected.last_hidden_state)
    for level, other in zip(features[1:], expected.hidden_states[:2], strict=True):
        assert_equal(level, other)
    assert_equal(features[0], twin.fpn.stem(maps[3]))
    cotangent = torch.randn_like(mask_features)
    gradients = torch.autograd.grad(mask_features, maps, cotangent)
    for gradient, other in zip(gradients, torch.autograd.grad(expected[0], maps, cotangent), strict=True):
        assert_equal(gradient, other)


def test_the_semantic_branch_sums_maps_enlarged_by_two_after_every_convolution():
    decoder = built(SemanticFPNPixelDecoderConfig(**WIDTH))
    maps = random_maps(EVEN)
    mask_features, features = decoder(maps)
    pyramid = decoder.fpn(maps)
    total = decoder.branches[3][0](pyramid[3])
    for branch, level in zip(decoder.branches[:3], pyramid[:3], strict=True):
        for convolve in branch:
            level = F.interpolate(convolve(level), scale_factor=2, mode="bilinear", align_corners=False)
        total = total + level
    assert [len(branch) for branch in decoder.branches] == [3, 2, 1, 1]
    assert_equal(mask_features, decoder.mask_features(total))
    assert all(torch.equal(level, other) for level, other in zip(features, pyramid[:3], strict=True))


def test_fusion_is_the_normalised_weighted_sum():
    fusion = WeightedFusion(3, 8).double()
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor([2.0, -1.0, 0.5]))
    maps = [torch.randn(1, 8, 3, 4, dtype=torch.float64) for _ in range(3)]
    mean = (2.0 * maps[0] + 0.5 * maps[2]) / (2.5 + 1e-4)
    _, depthwise, pointwise, norm = fusion.convolution
    activated = mean * mean.sigmoid()
    smoothed = [F.conv2d(activated[:, [i]], depthwise.weight[[i]], padding=1) for i in range(8)]
    mixed = torch.einsum("oi,bihw->bohw", pointwise.weight[:, :, 0, 0], torch.cat(smoothed, 1))
    assert_equal(fusion(*maps), norm(mixed))


@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
def test_a_bifpn_layer_follows_the_equations_of_the_paper(sizes):
    decoder = built(BiFPNPixelDecoderConfig(**WIDTH, num_layers=1))
    layer = decoder.layers[0]
    p5, p4, p3, p2 = maps = [torch.randn(2, 32, *size, dtype=torch.float64) for size in reversed(sizes)]

    def enlarge(feature, like):
        """Enlarge: pixel (y, x) of the large map is pixel (y // 2, x // 2) of the small map, whose size rounds up."""
        return feature.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : like.shape[2], : like.shape[3]]

    def shrink(feature):
        """Shrink by max pooling: pixel (y, x) is the maximum of the 3 x 3 pixels around (2 y, 2 x)."""
        height, width = feature.shape[-2:]
        rows = [
            [feature[:, :, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].amax((2, 3)) for x in range(0, width, 2)]
            for y in range(0, height, 2)
        ]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    p4_between = layer.down[0](p4, enlarge(p5, p4))
    p3_between = layer.down[1](p3, enlarge(p4_between, p3))
    p2_out = layer.down[2](p2, enlarge(p3_between, p2))
    p3_out = layer.up[0](p3, p3_between, shrink(p2_out))
    p4_out = layer.up[1](p4, p4_between, shrink(p3_out))
    p5_out = layer.up[2](p5, shrink(p4_out))
    for level, expected in zip(layer(maps), (p5_out, p4_out, p3_out, p2_out), strict=True):
        assert_equal(level, expected)


def bilinear(plane, y, x):
    """Return the bilinearly interpolated value of a plane at (y, x); pixels outside count as 0."""
    total, (height, width) = 0.0, plane.shape
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += plane[row, column].item() * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_alignment_equals_a_loop_over_pixels_taps_and_channels():
    torch.manual_seed(0)
    dim, groups, height, width = 4, 2, 3, 4
    alignment = FeatureAlignment(dim, groups).double()
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    feature, difference = torch.randn(2, 1, dim, height, width, dtype=torch.float64)
    predicted = alignment.offsets(difference)[0].detach()
    offsets = predicted[: groups * 18].view(groups, 9, 2, height, width)
    modulation = predicted[groups * 18 :].sigmoid().view(groups, 9, height, width)
    weight = alignment.weight.detach().flatten(2)
    expected = alignment.bias.detach()[:, None, None].repeat(1, height, width)
    for y in range(height):
        for x in range(width):
            for tap in range(9):
                for channel in range(dim):
                    group = channel // (dim // groups)
                    dy, dx = offsets[group, tap, :, y, x].tolist()
                    value = bilinear(feature[0, channel], y + tap // 3 - 1 + dy, x + tap % 3 - 1 + dx)
                    expected[:, y, x] += weight[:, channel, tap] * value * modulation[group, tap, y, x]
    assert_equal(alignment(feature, difference)[0].detach(), expected)


def test_alignment_is_initialised_as_half_a_plain_convolution():
    torch.manual_seed(0)
    alignment = FeatureAlignment(16, 4)
    feature, difference = torch.randn(2, 1, 16, 5, 7)
    expected = F.conv2d(feature, alignment.weight, padding=1) / 2
    torch.testing.assert_close(alignment(feature, difference), expected, rtol=1e-4, atol=1e-5)


def test_an_aligned_step_follows_the_equations_of_the_paper():
    torch.manual_seed(0)
    step = perturbed(AlignedStep(12, 16, 4))
    fine, coarse = torch.randn(2, 12, 7, 9, dtype=torch.float64), torch.randn(2, 16, 4, 5, dtype=torch.float64)
    pooled = fine.flatten(2).mean(-1)
    importance = (pooled @ step.selection.importance.weight[:, :, 0, 0].T).sigmoid()
    emphasised = fine * (1 + importance[:, :, None, None])
    selected = torch.einsum("oi,bihw->bohw", step.selection.projection.weight[:, :, 0, 0], emphasised)
    enlarged = F.interpolate(coarse, (7, 9), mode="bilinear", align_corners=False)
    difference = step.difference(torch.cat([selected, 2 * enlarged], 1))
    assert_equal(step(fine, coarse), selected + step.alignment(enlarged, difference).clamp(min=0))


def test_fapn_top_down_path_uses_maps_before_smoothing():
    decoder = built(FaPNPixelDecoderConfig(**WIDTH, offset_groups=4))
    maps = random_maps(ODD)
    mask_features, features = decoder(maps)
    p5 = decoder.top(maps[3])
    p4 = decoder.steps[0](maps[2], p5)
    p3 = decoder.steps[1](maps[1], p4)
    p2 = decoder.steps[2](maps[0], p3)
    for level, expected in zip(features, (p5, decoder.outputs[0](p4), decoder.outputs[1](p3)), strict=True):
        assert_equal(level, expected)
    assert_equal(mask_features, decoder.mask_features(decoder.outputs[2](p2)))


def test_the_transformer_encoder_equals_torchs_attention():
    config = TransformerFPNPixelDecoderConfig(**WIDTH, num_layers=2, num_heads=4, feedforward_dim=48)
    decoder = built(config)
    maps = random_maps(ODD)
    mask_features, features = decoder(maps)
    tokens = decoder.input_proj(maps[3]).flatten(2).transpose(1, 2)
    position = sine_position_embedding(2, 3, 32).flatten(0, 1).double()
    for layer in decoder.layers:
        attention = nn.MultiheadAttention(32, 4, batch_first=True).double()
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([layer.query_key.weight, layer.value.weight]),
                "in_proj_bias": torch.cat([layer.query_key.bias, layer.value.bias]),
                "out_proj.weight": layer.attention.output.weight,
                "out_proj.bias": layer.attention.output.bias,
            }
        )
        placed = tokens + position
        tokens = layer.attention.norm(tokens + attention(placed, placed, tokens, need_weights=False)[0])
        tokens = layer.norm(tokens + layer.linear2(layer.linear1(tokens).clamp(min=0)))
    encoded = tokens.transpose(1, 2).reshape(2, 32, 2, 3)
    assert_equal(features[0], encoded)
    pyramid = decoder.fpn((*maps[:3], encoded))
    assert_equal(features[1], pyramid[1])
    assert_equal(mask_features, decoder.mask_features(pyramid[3]))
