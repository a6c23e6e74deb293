"""Feature pyramid network (Lin et al., CVPR 2017) as used by MaskFormer. Other pixel decoders share its pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import FPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, lateral, output


class TopDownStep(nn.Module):
    """Adds the enlarged coarser map to a lateral one and smooths the sum."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.lateral = lateral(in_channels, dim)
        self.output = output(dim, dim)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Combine `fine` [B, in_channels, h, w] of the backbone and `coarse` [B, dim, ., .] to [B, dim, h, w]."""
        fine = self.lateral(fine)
        return self.output(fine + F.interpolate(coarse, fine.shape[-2:], mode="nearest"))


class FeaturePyramid(nn.Module):
    """Top-down pathway. Unlike in Lin et al., each step starts from the smoothed coarser map (MaskFormer's code)."""

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        """Build the pyramid for maps with `channels` from fine to coarse."""
        super().__init__()
        *others, coarsest = channels
        self.top = output(coarsest, dim)
        self.steps = nn.ModuleList(TopDownStep(width, dim) for width in reversed(others))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return maps [B, dim, ., .] from coarse to fine, as large as `features`, which come from fine to coarse."""
        *others, coarsest = features
        pyramid = [self.top(coarsest)]
        for step, feature in zip(self.steps, reversed(others), strict=True):
            pyramid.append(step(feature, pyramid[-1]))
        return tuple(pyramid)


class FPNPixelDecoder(PixelDecoder):
    """Feature pyramid network. Mask features come from its finest map, multi-scale features from the other three."""

    def __init__(self, config: FPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        self.fpn = FeaturePyramid(channels, config.conv_dim)
        self.mask_features = convolution(config.conv_dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        *coarse, finest = self.fpn(features)
        return self.mask_features(finest), tuple(coarse)
