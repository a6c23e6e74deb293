"""Costs of single operations, in the multiply-adds that the paper's tool (fvcore) counts.

Matrix products count one per multiply-add. Norms, resizes and bilinear samples count the tool's estimates per element.
Activations, softmax, sums and dropout count as zero. Costs are for one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NORM = 5
"""LayerNorm and GroupNorm, multiply-adds per element."""
BATCH_NORM = 2
"""BatchNorm with fixed statistics, multiply-adds per element."""
BILINEAR = 4
"""Bilinear resize or sampling, multiply-adds per output element."""
NEAREST = 1
"""Nearest-neighbour resize, multiply-adds per output element."""

STRIDES = (4, 8, 16, 32)
"""Strides of the four maps of every backbone."""


@dataclass(frozen=True)
class Flops:
    """Multiply-adds for one image, by part of the model."""

    backbone: float
    pixel_decoder: float
    transformer_decoder: float
    inference: float = 0.0
    """Resizing of masks to the input size and, for semantic segmentation, their sum over queries."""

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return self.backbone + self.pixel_decoder + self.transformer_decoder + self.inference


@dataclass(frozen=True)
class MapSize:
    """Size of a feature map, or of a sequence of tokens with width 1."""

    height: int
    """Height in pixels."""
    width: int
    """Width in pixels; 1 for a sequence of tokens, whose length is the height."""

    @property
    def pixels(self) -> int:
        """Return the number of pixels or tokens."""
        return self.height * self.width

    def strided(self, stride: int) -> MapSize:
        """Return the map size after a padded convolution of this stride."""
        return MapSize(math.ceil(self.height / stride), math.ceil(self.width / stride))


def pyramid(size: tuple[int, int]) -> tuple[MapSize, MapSize, MapSize, MapSize]:
    """Return the map sizes at strides 4, 8, 16 and 32 for an input of this height and width."""
    stride4, stride8, stride16, stride32 = (MapSize(*size).strided(stride) for stride in STRIDES)
    return stride4, stride8, stride16, stride32


def convolution(pixels: int, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> int:
    """Return the cost of a convolution with `pixels` output pixels. A linear layer over tokens has kernel 1."""
    return pixels * inputs * outputs * kernel * kernel // groups


def group_normed(pixels: int, inputs: int, outputs: int, kernel: int = 1) -> int:
    """Return the cost of a convolution with GroupNorm."""
    return convolution(pixels, inputs, outputs, kernel) + NORM * pixels * outputs


def attention(queries: int, keys: int, channels: int) -> int:
    """Return the cost of the products of queries with keys and of weights with values, over all heads."""
    return 2 * queries * keys * channels


def feed_forward(tokens: int, channels: int, hidden: int) -> int:
    """Return the cost of two linear layers, from `channels` to `hidden` and back."""
    return 2 * tokens * channels * hidden
