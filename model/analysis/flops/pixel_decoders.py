"""Multiply-adds of the pixel decoders, as in the official code or, for decoders it does not have, as in ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from m2f.model.analysis.flops.operations import (
    BILINEAR,
    NEAREST,
    NORM,
    MapSize,
    attention,
    convolution,
    feed_forward,
    group_normed,
)
from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    MSDeformAttnPixelDecoderConfig,
    MultiScalePixelDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    TransformerFPNPixelDecoderConfig,
)


def pixel_decoder(config: MultiScalePixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    """Return the multiply-adds for a backbone with these `channels` and `maps` at strides 4, 8, 16, 32."""
    match config:
        case MSDeformAttnPixelDecoderConfig():
            return _ms_deform_attn(config, channels, maps)
        case FPNPixelDecoderConfig():
            return _pyramid(config.conv_dim, channels, maps) + _mask_features(config, maps)
        case SemanticFPNPixelDecoderConfig():
            return _semantic_fpn(config, channels, maps)
        case BiFPNPixelDecoderConfig():
            return _bifpn(config, channels, maps)
        case FaPNPixelDecoderConfig():
            return _fapn(config, channels, maps)
        case TransformerFPNPixelDecoderConfig():
            return _transformer_fpn(config, channels, maps)
        case _:
            assert_never(config)


def _ms_deform_attn(config: MSDeformAttnPixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    """Return the cost of the deformable encoder over strides 8 to 32 and one FPN step to stride 4."""
    dim, (stride4, *others) = config.conv_dim, maps
    pixels = sum(level.pixels for level in others)
    projections = sum(group_normed(level.pixels, width, dim) for level, width in zip(others, channels[1:], strict=True))
    samples = config.num_heads * len(others) * config.num_points
    layer = convolution(pixels, dim, 3 * samples)  # offsets and weights
    layer += 2 * convolution(pixels, dim, dim)  # values and output
    layer += BILINEAR * pixels * len(others) * config.num_points * dim
    layer += feed_forward(pixels, dim, config.feedforward_dim) + 2 * NORM * pixels * dim
    step = group_normed(stride4.pixels, channels[0], dim) + BILINEAR * stride4.pixels * dim
    step += group_normed(stride4.pixels, dim, dim, 3) + convolution(stride4.pixels, dim, config.mask_dim)
    return projections + config.num_layers * layer + step


def _pyramid(dim: int, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    """Return the cost of an FPN.

    The coarsest map is convolved. Every finer map is projected, added to the enlarged coarser one and convolved.
    """
    *finer, coarsest = maps
    total = group_normed(coarsest.pixels, channels[-1], dim, 3)
    for level, width in zip(finer, channels[:-1], strict=True):
        total += (
            group_normed(level.pixels, width, dim)
            + NEAREST * level.pixels * dim
            + group_normed(level.pixels, dim, dim, 3)
        )
    return total


def _mask_features(config: MultiScalePixelDecoderConfig, maps: Sequence[MapSize]) -> int:
    """Return the cost of the 3x3 convolution at stride 4."""
    return convolution(maps[0].pixels, config.conv_dim, config.mask_dim, 3)


def _semantic_fpn(config: SemanticFPNPixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    dim = config.conv_dim
    total = _pyramid(dim, channels, maps) + group_normed(maps[0].pixels, dim, dim, 3) + _mask_features(config, maps)
    for level in range(1, len(maps)):
        for coarser, finer in zip(maps[level:0:-1], maps[level - 1 :: -1], strict=True):
            total += group_normed(coarser.pixels, dim, dim, 3) + BILINEAR * finer.pixels * dim
    return total


def _bifpn(config: BiFPNPixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    dim = config.conv_dim
    total = _mask_features(config, maps)
    for level, width in zip(maps, channels, strict=True):
        total += group_normed(level.pixels, width, dim) + group_normed(level.pixels, dim, dim, 3)
    nodes = [*maps[:-1], *maps[1:]]  # down to the finest and up again
    fusions = sum(
        convolution(node.pixels, dim, dim, 3, groups=dim) + group_normed(node.pixels, dim, dim) for node in nodes
    )
    return total + config.num_layers * (fusions + sum(NEAREST * node.pixels * dim for node in nodes))


def _fapn(config: FaPNPixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    dim, (*finer, coarsest) = config.conv_dim, maps
    total = _mask_features(config, maps) + group_normed(coarsest.pixels, channels[-1], dim)
    for level, width in zip(finer, channels[:-1], strict=True):
        total += convolution(1, width, width) + convolution(level.pixels, width, dim)  # importance and selection
        total += BILINEAR * level.pixels * dim + group_normed(level.pixels, 2 * dim, dim)
        total += convolution(level.pixels, dim, 27 * config.offset_groups, 3)  # two offsets and a factor for 9 samples
        total += convolution(level.pixels, dim, dim, 3)  # deformable
        total += group_normed(level.pixels, dim, dim, 3)
    return total


def _transformer_fpn(config: TransformerFPNPixelDecoderConfig, channels: Sequence[int], maps: Sequence[MapSize]) -> int:
    dim, tokens = config.conv_dim, maps[-1].pixels
    layer = 4 * convolution(tokens, dim, dim) + attention(tokens, tokens, dim)
    layer += feed_forward(tokens, dim, config.feedforward_dim) + 2 * NORM * tokens * dim
    encoder = convolution(tokens, channels[-1], dim) + config.num_layers * layer
    return encoder + _pyramid(dim, (*channels[:-1], dim), maps) + _mask_features(config, maps)
