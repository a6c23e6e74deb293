"""Multi-scale deformable attention encoder and one FPN step (Mask2Former, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import MSDeformAttnPixelDecoderConfig
from m2f.model.deform_attn.module import MSDeformAttn, SamplingGrid
from m2f.model.layers import PixelDecoder, convolution, group_norm, lateral, output, relu_of_new, run_layer
from m2f.model.position_encoding import sine_position_embedding


def _input_projection(in_channels: int, channels: int) -> nn.Sequential:
    layer = convolution(in_channels, channels, 1)
    nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layer, group_norm(channels))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by a residual connection and LayerNorm."""

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
        """Update `source` [B, S, C]; `position` [S, C] is added to the queries only."""
        attended = self.attention(source + position, source, grid)
        source = self.norm1(source + self.dropout(attended))
        expanded = self.linear2(self.dropout(relu_of_new(self.linear1(source))))
        return self.norm2(source + self.dropout(expanded))


class MSDeformAttnPixelDecoder(PixelDecoder):
    """Deformable self-attention over the pixels of strides 8 to 32, and one FPN step to stride 4."""

    def __init__(self, config: MSDeformAttnPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        dim = config.conv_dim
        stride4, *others = channels
        self.checkpointing = config.checkpointing
        self.input_proj = nn.ModuleList(_input_projection(width, dim) for width in reversed(others))
        self.level_embed = nn.Parameter(torch.randn(len(others), dim))
        self.layers = nn.ModuleList(EncoderLayer(config, len(others)) for _ in range(config.num_layers))
        self.lateral = lateral(stride4, dim)
        self.output = output(dim, dim)
        self.mask_features = convolution(dim, config.mask_dim, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        stride4, *others = features
        projected = [proj(feature) for proj, feature in zip(self.input_proj, reversed(others), strict=True)]
        maps = self._encode(projected)
        fused = self.lateral(stride4)
        coarse = maps[-1].to(fused.dtype)
        if coarse.is_cpu:  # tokens are channels-last, `fused` is not: convert the smaller map
            coarse = coarse.contiguous()
        fused = fused + F.interpolate(coarse, fused.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(fused)), maps

    def _encode(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the encoder over the pixels of all levels as one sequence, and return its output as maps."""
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in maps]
        device = maps[0].device
        # The residual stream keeps the parameters' dtype: float32 under autocast.
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1).to(self.level_embed.dtype)
        position = torch.cat(
            [
                sine_position_embedding(*shape, self.feature_dim, device).flatten(0, 1) + embedding
                for shape, embedding in zip(shapes, self.level_embed, strict=True)
            ]
        ).to(tokens.dtype)
        grid = SamplingGrid.of_pixels(shapes, device)
        for layer in self.layers:
            tokens = run_layer(layer, self.checkpointing, tokens, position, grid)
        levels = tokens.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
        return tuple(level.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True))
