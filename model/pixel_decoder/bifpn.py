"""Bidirectional feature pyramid with weighted fusion (EfficientDet: Tan et al., CVPR 2020, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import BiFPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, group_norm, keep_in_graph, lateral, output

_EPSILON = 1e-4
"""Keeps the fusion weights finite if all of them are zero."""


class WeightedFusion(nn.Module):
    """Weighted mean of maps with learned weights ("fast normalised fusion"), followed by a separable convolution."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.convolution = nn.Sequential(
            nn.SiLU(),
            convolution(dim, dim, 3, bias=False, groups=dim),
            convolution(dim, dim, 1, bias=False),
            group_norm(dim),
        )

    def forward(self, *maps: Tensor) -> Tensor:
        """Fuse maps [B, dim, h, w] into one map of the same shape."""
        weights = self.weights.relu()
        weights = (weights / (weights.sum() + _EPSILON)).to(maps[0].dtype)
        fused = [level * weight for level, weight in zip(maps, weights, strict=True)]
        return self.convolution(sum(fused[1:], start=fused[0]))


class BiFPNLayer(nn.Module):
    """One top-down and one bottom-up pass. Every node also receives the layer's input of its level (figure 2d)."""

    def __init__(self, levels: int, dim: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(WeightedFusion(2, dim) for _ in range(levels - 1))
        self.up = nn.ModuleList(WeightedFusion(3 if index < levels - 2 else 2, dim) for index in range(levels - 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps of the same shapes for `maps` [B, dim, ., .], from coarse to fine."""
        enlarged = [maps[0]]
        for fuse, level in zip(self.down, maps[1:], strict=True):
            enlarged.append(fuse(level, F.interpolate(enlarged[-1], level.shape[-2:], mode="nearest")))
        # The coarsest level has no top-down node, so its map is a single input.
        inputs = [(maps[0],), *zip(maps[1:-1], enlarged[1:-1], strict=True)]
        fused = [enlarged[-1]]
        for fuse, levels in zip(self.up, reversed(inputs), strict=True):
            fused.append(fuse(*levels, _shrunk(fused[-1], levels[0].shape[-2:])))
        return fused[::-1]


def _shrunk(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Return the 3x3 maximum at stride 2, resized to `size` unless that is half the input's size, rounded up."""
    return F.interpolate(F.max_pool2d(feature, 3, stride=2, padding=1), tuple(size), mode="nearest")


class BiFPNPixelDecoder(PixelDecoder):
    """FPN with BiFPN layers between the lateral and the output convolutions.

    The paper does not specify depth and convolutions; docs/numerics.md explains the choice.
    """

    def __init__(self, config: BiFPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        dim, levels = config.conv_dim, len(channels)
        self.laterals = nn.ModuleList(lateral(width, dim) for width in reversed(channels))
        self.layers = nn.Sequential(*(BiFPNLayer(levels, dim) for _ in range(config.num_layers)))
        self.outputs = nn.ModuleList(output(dim, dim) for _ in range(levels))
        self.mask_features = convolution(dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        maps = [project(feature) for project, feature in zip(self.laterals, reversed(features), strict=True)]
        fused = self.layers(maps)
        *coarse, finest = (smooth(level) for smooth, level in zip(self.outputs, fused, strict=True))
        return keep_in_graph(self.mask_features(finest), coarse), tuple(coarse)
