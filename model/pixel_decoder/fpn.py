"""Feature pyramid network (Lin et al., CVPR 2017) as MaskFormer uses it; its pyramid also serves other decoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import FPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, lateral, output


class TopDownStep(nn.Module):
    """Adds the map above, enlarged, to a lateral one and smooths the sum."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.lateral = lateral(in_channels, dim)
        self.output = output(dim, dim)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """`fine` [B, in_channels, h, w] of the backbone and `coarse` [B, dim, ., .] to [B, dim, h, w]."""
        fine = self.lateral(fine)
        return self.output(fine + F.interpolate(coarse, fine.shape[-2:], mode="nearest"))


class FeaturePyramid(nn.Module):
    """Top-down pathway. Unlike in Lin et al., each step starts from the smoothed map above (MaskFormer's code)."""

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        """`channels` of the maps from fine to coarse."""
        super().__init__()
        *others, coarsest = channels
        self.top = output(coarsest, dim)
        self.steps = nn.ModuleList(TopDownStep(width, dim) for width in reversed(others))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`features` from fine to coarse to maps [B, dim, ., .] of the same sizes from coarse to fine."""
        *others, coarsest = features
        pyramid = [self.top(coarsest)]
        for step, feature in zip(self.steps, reversed(others), strict=True):
            pyramid.append(step(feature, pyramid[-1]))
        return tuple(pyramid)


class FPNPixelDecoder(PixelDecoder):
    """Feature pyramid network: mask features from its finest map, multi-scale features from the other three."""

    def __init__(self, config: FPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """`channels` of the backbone's maps at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        self.fpn = FeaturePyramid(channels, config.conv_dim)
        self.mask_features = convolution(config.conv_dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See PixelDecoder."""
        *coarse, finest = self.fpn(features)
        return self.mask_features(finest), tuple(coarse)
