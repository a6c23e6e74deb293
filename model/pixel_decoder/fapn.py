"""Feature-aligned pyramid network (FaPN: Huang et al., ICCV 2021).

It selects and aligns features before adding them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from m2f.model.attention import to_at_least_float32
from m2f.model.config import FaPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, keep_in_graph, lateral, output

_TAPS = 9
"""Samples per 3x3 kernel."""


class FeatureSelection(nn.Module):
    """Emphasises channels according to their mean over the map, then projects (section 3.2.2)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.importance = convolution(in_channels, in_channels, 1, bias=False)
        self.projection = convolution(in_channels, dim, 1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Map [B, in_channels, h, w] to [B, dim, h, w]."""
        importance = self.importance(feature.mean((2, 3), keepdim=True)).sigmoid()
        return self.projection(feature + feature * importance)


class OffsetConvolution(nn.Conv2d):
    """3x3 convolution for sampling offsets, initialised to zero.

    It computes in float32 regardless of autocast and of its own dtype, because offsets are coordinates.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__(dim, channels, 3, padding=1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Conv2d
        """Map [B, dim, h, w] to float32 [B, channels, h, w]; float64 stays float64."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else to_at_least_float32(self.bias)
            return self._conv_forward(to_at_least_float32(input), to_at_least_float32(self.weight), bias)


class FeatureAlignment(nn.Module):
    """Modulated deformable convolution whose offsets are predicted from another map (section 3.2.1)."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.offsets = OffsetConvolution(dim, groups * _TAPS * 3)
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # +-1 / sqrt(fan_in), as in torchvision's DeformConv2d

    def forward(self, feature: Tensor, difference: Tensor) -> Tensor:
        """Return `feature` [B, dim, h, w], aligned by `difference` [B, dim, h, w], in float32 at least."""
        predicted = self.offsets(difference)
        offsets, modulation = predicted.split([2 * self.groups * _TAPS, self.groups * _TAPS], dim=1)
        feature, weight, bias = (to_at_least_float32(tensor) for tensor in (feature, self.weight, self.bias))
        with torch.autocast(feature.device.type, enabled=False):
            return deform_conv2d(feature, offsets, weight, bias, padding=(1, 1), mask=modulation.sigmoid())


class AlignedStep(nn.Module):
    """Adds the coarser map, enlarged and aligned, to the selected features of a backbone's map."""

    def __init__(self, in_channels: int, dim: int, groups: int) -> None:
        super().__init__()
        self.selection = FeatureSelection(in_channels, dim)
        self.difference = lateral(2 * dim, dim)
        self.alignment = FeatureAlignment(dim, groups)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Combine `fine` [B, in_channels, h, w] of the backbone and `coarse` [B, dim, ., .] to [B, dim, h, w]."""
        selected = self.selection(fine)
        coarse = F.interpolate(coarse, selected.shape[-2:], mode="bilinear", align_corners=False)
        difference = self.difference(torch.cat([selected, 2 * coarse.to(selected.dtype)], dim=1))
        return selected + self.alignment(coarse, difference).relu().to(selected.dtype)


class FaPNPixelDecoder(PixelDecoder):
    """FPN whose top-down steps align the coarse map with the fine one. Smoothed maps do not enter the top-down path."""

    def __init__(self, config: FaPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        dim = config.conv_dim
        *others, coarsest = channels
        self.top = lateral(coarsest, dim)
        self.steps = nn.ModuleList(AlignedStep(width, dim, config.offset_groups) for width in reversed(others))
        self.outputs = nn.ModuleList(output(dim, dim) for _ in others)
        self.mask_features = convolution(dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        *others, coarsest = features
        level = self.top(coarsest)
        maps = [level]
        for step, smooth, feature in zip(self.steps, self.outputs, reversed(others), strict=True):
            level = step(feature, level)
            maps.append(smooth(level))
        *coarse, finest = maps
        return keep_in_graph(self.mask_features(finest), coarse), tuple(coarse)
