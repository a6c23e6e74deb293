"""Pixel decoder: multi-scale deformable attention encoder and one FPN step (Mask2Former, section 3.2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MSDeformAttnPixelDecoderConfig
from model.errors import ConfigError
from model.ms_deform_attn import MSDeformAttn, SamplingGrid
from model.position_encoding import sine_position_embedding


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or as many powers of two as divide `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def convolution(in_channels: int, channels: int, kernel: int, *, bias: bool = True) -> nn.Conv2d:
    """Convolution that keeps the size, initialised uniformly over +-sqrt(3 / fan_in) with zero bias."""
    layer = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _input_projection(in_channels: int, channels: int) -> nn.Sequential:
    layer = convolution(in_channels, channels, 1)
    nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layer, group_norm(channels))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with residual and LayerNorm after it."""

    def __init__(self, config: MSDeformAttnPixelDecoderConfig, levels: int) -> None:
        super().__init__()
        dim = config.conv_dim
        self.linear1 = nn.Linear(dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.attention = MSDeformAttn(dim, levels, config.num_heads, config.num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Tensor, position: Tensor, grid: SamplingGrid) -> Tensor:
        """`source` [B, S, C] to the same shape; `position` [S, C] is added to the queries only."""
        attended = self.attention(source + position, source, grid)
        source = self.norm1(source + self.dropout(attended))
        expanded = self.linear2(self.dropout(self.linear1(source).relu()))
        return self.norm2(source + self.dropout(expanded))


class MSDeformAttnPixelDecoder(nn.Module):
    """Turns a backbone's maps at strides 4 to 32 into per-pixel embeddings and multi-scale features."""

    def __init__(self, config: MSDeformAttnPixelDecoderConfig, channels: Sequence[int]) -> None:
        """`channels` of the backbone's maps at strides 4, 8, 16, 32."""
        super().__init__()
        dim = config.conv_dim
        if dim % config.num_heads or dim % 4:
            raise ConfigError(
                f"model.pixel_decoder.conv_dim is {dim}; 4 and num_heads ({config.num_heads}) must divide it"
            )
        stride4, *others = channels
        self.dim = dim
        self.input_proj = nn.ModuleList(_input_projection(width, dim) for width in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(len(others), dim))
        self.layers = nn.ModuleList(EncoderLayer(config, len(others)) for _ in range(config.num_layers))
        self.lateral = nn.Sequential(convolution(stride4, dim, 1, bias=False), group_norm(dim))
        self.output = nn.Sequential(convolution(dim, dim, 3, bias=False), group_norm(dim), nn.ReLU())
        self.mask_features = convolution(dim, config.mask_dim, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`features` at strides 4, 8, 16, 32 to mask features [B, mask_dim, h, w] at stride 4 and three maps
        [B, conv_dim, ., .] in the order 1/32, 1/16, 1/8.
        """
        stride4, *others = features
        projected = [proj(feature) for proj, feature in zip(self.input_proj, reversed(others), strict=True)]
        maps = self._encode(projected)
        fused = self.lateral(stride4)
        fused = fused + F.interpolate(maps[-1].to(fused.dtype), fused.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(fused)), maps

    def _encode(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the encoder over the pixels of all levels as one sequence."""
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in maps]
        device = maps[0].device
        # The residual stream has the parameters' dtype: float32 under autocast.
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1).to(self.level_embed.dtype)
        position = torch.cat(
            [
                sine_position_embedding(*shape, self.dim, device).flatten(0, 1) + embedding
                for shape, embedding in zip(shapes, self.level_embed, strict=True)
            ]
        ).to(tokens.dtype)
        grid = SamplingGrid.of_pixels(shapes, device)
        for layer in self.layers:
            tokens = layer(tokens, position, grid)
        levels = tokens.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
        return tuple(level.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True))
