"""Simple feature pyramid: four maps from the last map of a plain vision transformer.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3.
"""

from __future__ import annotations

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

PYRAMID_CHANNELS = 256
"""Channels of all four maps, as in ViTDet."""


class SimpleFeaturePyramid(nn.Module):
    """Scales the map at stride 16 by 4, 2, 1 and 1/2, with separate convolutions for each scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                    *_to_output(quarter),
                ),
                nn.Sequential(nn.ConvTranspose2d(channels, half, 2, stride=2), *_to_output(half)),
                nn.Sequential(*_to_output(channels)),
                nn.Sequential(nn.MaxPool2d(2), *_to_output(channels)),
            )
        )

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Map [B, C, H / 16, W / 16] to four maps [B, 256, H / s, W / s] at strides s of 4, 8, 16, 32."""
        return tuple(level(features) for level in self.levels)


def _to_output(channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, PYRAMID_CHANNELS, 1, bias=False),
        LayerNorm2d(PYRAMID_CHANNELS),
        nn.Conv2d(PYRAMID_CHANNELS, PYRAMID_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(PYRAMID_CHANNELS),
    )
