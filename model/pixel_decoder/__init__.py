"""Pixel decoders: from a backbone's maps to per-pixel embeddings and multi-scale features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    MSDeformAttnPixelDecoderConfig,
    MultiScalePixelDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.layers import PixelDecoder, convolution, group_norm
from m2f.model.pixel_decoder.bifpn import BiFPNPixelDecoder
from m2f.model.pixel_decoder.deformable import MSDeformAttnPixelDecoder
from m2f.model.pixel_decoder.fapn import FaPNPixelDecoder
from m2f.model.pixel_decoder.fpn import FPNPixelDecoder
from m2f.model.pixel_decoder.semantic_fpn import SemanticFPNPixelDecoder
from m2f.model.pixel_decoder.transformer_fpn import TransformerFPNPixelDecoder

__all__ = ["MSDeformAttnPixelDecoder", "PixelDecoder", "build_pixel_decoder", "convolution", "group_norm"]


def build_pixel_decoder(config: MultiScalePixelDecoderConfig, channels: Sequence[int]) -> PixelDecoder:
    """Build the pixel decoder of a recipe for a backbone with `channels` at strides 4, 8, 16, 32."""
    match config:
        case MSDeformAttnPixelDecoderConfig():
            return MSDeformAttnPixelDecoder(config, channels)
        case FPNPixelDecoderConfig():
            return FPNPixelDecoder(config, channels)
        case SemanticFPNPixelDecoderConfig():
            return SemanticFPNPixelDecoder(config, channels)
        case BiFPNPixelDecoderConfig():
            return BiFPNPixelDecoder(config, channels)
        case FaPNPixelDecoderConfig():
            return FaPNPixelDecoder(config, channels)
        case TransformerFPNPixelDecoderConfig():
            return TransformerFPNPixelDecoder(config, channels)
        case _:
            assert_never(config)
