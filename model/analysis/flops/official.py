"""Multiply-adds of the official code for a recipe's model, by formula: the FLOPs of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import assert_never

from m2f.model.analysis.flops.backbones import RESNET_BLOCKS, resnet, swin
from m2f.model.analysis.flops.executed import (
    build_backbone_shapes,
    build_shapes,
    executed_backbone_flops,
    executed_flops,
)
from m2f.model.analysis.flops.operations import BILINEAR, Flops, MapSize, pyramid
from m2f.model.analysis.flops.pixel_decoders import pixel_decoder
from m2f.model.analysis.flops.transformer_decoders import masked, standard
from m2f.model.backbones.timm_names import without_tag
from m2f.model.config import (
    BackboneConfig,
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MultiScalePixelDecoderConfig,
    PmtDecoderConfig,
    StandardTransformerDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
    UpscalePixelDecoderConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.errors import ConfigError

COCO_SIZES: Mapping[tuple[int, int], int] = MappingProxyType(
    {
        (672, 1344): 1,
        (736, 1344): 2,
        (768, 1344): 6,
        (800, 800): 5,
        (800, 832): 2,
        (800, 896): 1,
        (800, 928): 1,
        (800, 960): 3,
        (800, 992): 1,
        (800, 1024): 2,
        (800, 1088): 33,
        (800, 1120): 2,
        (800, 1184): 2,
        (800, 1216): 36,
        (800, 1248): 1,
        (800, 1344): 2,
    }
)
"""Input sizes over which the paper's FLOPs on COCO are averaged, with their frequency. They are those of the first 100
images (by id) of val2017, with the shorter side at 800, the longer at most 1333, and padding to 32. Height and width
are in either order."""


def official_flops(config: ModelConfig, size: tuple[int, int], *, semantic: bool = False) -> Flops:
    """Return the multiply-adds for an input of this height and width. `semantic` adds the semantic inference.

    Backbones and heads that the official code does not have are counted as this project executes them; for such heads,
    inference is not counted. Raises ConfigError if `config.num_classes` is None.
    """
    return flops_counter(config)(size, semantic)


def mean_flops(config: ModelConfig, sizes: Mapping[tuple[int, int], int] = COCO_SIZES) -> Flops:
    """Return the mean of `official_flops` over input sizes, weighted by their frequency."""
    images, count_flops = sum(sizes.values()), flops_counter(config)
    counted = [(count / images, count_flops(size, False)) for size, count in sizes.items()]
    return Flops(**{f.name: sum(share * getattr(flops, f.name) for share, flops in counted) for f in fields(Flops)})


def flops_counter(config: ModelConfig) -> Callable[[tuple[int, int], bool], Flops]:
    """Return `official_flops` as a function of `size` and `semantic`. Modules that are executed are built once.

    Raises ConfigError if `config.num_classes` is None.
    """
    num_classes, decoder, pixels = config.num_classes, config.transformer_decoder, config.pixel_decoder
    if num_classes is None:
        raise ConfigError("model.num_classes is not set; take it from the category table of the data set")
    if isinstance(decoder, EomtDecoderConfig | PmtDecoderConfig) or isinstance(pixels, UpscalePixelDecoderConfig):
        model = build_shapes(config)
        return lambda size, semantic: executed_flops(model, size)
    backbone_flops, channels = _backbone(config.backbone)

    def count(size: tuple[int, int], semantic: bool) -> Flops:
        maps, area = pyramid(size), size[0] * size[1]
        return Flops(
            backbone=backbone_flops(size),
            pixel_decoder=pixel_decoder(pixels, channels, maps),
            transformer_decoder=_transformer_decoder(decoder, pixels, num_classes, channels[-1], maps),
            inference=decoder.num_queries * area * (BILINEAR + (num_classes if semantic else 0)),
        )

    return count


def _transformer_decoder(
    decoder: MaskedTransformerDecoderConfig | StandardTransformerDecoderConfig,
    pixel: MultiScalePixelDecoderConfig,
    num_classes: int,
    coarsest_channels: int,
    maps: Sequence[MapSize],
) -> int:
    match decoder:
        case MaskedTransformerDecoderConfig():
            return masked(decoder, pixel.conv_dim, pixel.mask_dim, num_classes, maps)
        case StandardTransformerDecoderConfig():
            encoded = isinstance(pixel, TransformerFPNPixelDecoderConfig)
            in_dim = pixel.conv_dim if encoded else coarsest_channels
            return standard(decoder, in_dim, pixel.mask_dim, num_classes, maps)
        case _:
            assert_never(decoder)


def _backbone(config: BackboneConfig) -> tuple[Callable[[tuple[int, int]], float], tuple[int, ...]]:
    """Return the multiply-adds as a function of the input size, and the channels at strides 4, 8, 16 and 32."""
    match config:
        case SwinBackboneConfig():
            channels = tuple(config.embed_dim * 2**stage for stage in range(4))
            return partial(swin, config.embed_dim, config.depths, config.window_size), channels
        case TimmBackboneConfig() if (name := without_tag(config.name)) in RESNET_BLOCKS and not config.options:
            return partial(resnet, RESNET_BLOCKS[name]), (256, 512, 1024, 2048)
        case TimmBackboneConfig() | ViTAdapterBackboneConfig():
            backbone = build_backbone_shapes(config)
            return partial(executed_backbone_flops, backbone), backbone.channels
        case _:
            assert_never(config)
