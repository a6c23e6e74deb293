"""Semantic branch of Panoptic FPN (Kirillov et al., CVPR 2019, section 3 and figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import SemanticFPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, output
from m2f.model.pixel_decoder.fpn import FeaturePyramid


class SemanticFPNPixelDecoder(PixelDecoder):
    """FPN whose four maps are convolved, enlarged step by step to stride 4 and summed."""

    def __init__(self, config: SemanticFPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        dim = config.conv_dim
        self.fpn = FeaturePyramid(channels, dim)
        # From coarse to fine: one convolution per enlargement, and one for the finest map, which is not enlarged.
        self.branches = nn.ModuleList(
            nn.ModuleList(output(dim, dim) for _ in range(max(1, level))) for level in reversed(range(len(channels)))
        )
        self.mask_features = convolution(dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        pyramid = self.fpn(features)
        sizes = [level.shape[-2:] for level in pyramid]
        enlarged = [
            _enlarged(branch, level, sizes[index:])
            for index, (branch, level) in enumerate(zip(self.branches, pyramid, strict=True), start=1)
        ]
        return self.mask_features(sum(enlarged[1:], start=enlarged[0])), pyramid[:-1]


def _enlarged(branch: nn.Module, level: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Apply a branch's convolutions to `level`, enlarging after each one to the next of `sizes` if there is one."""
    for index, convolve in enumerate(branch.children()):
        level = convolve(level)
        if index < len(sizes):
            level = F.interpolate(level, sizes[index], mode="bilinear", align_corners=False)
    return level
