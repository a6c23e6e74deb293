"""Cost of single operations, in the multiply-adds that the paper's tool (fvcore) counts.

A product counts one per multiply-add. Norms, resizes and bilinear samples count the tool's estimates per element;
activations, softmax, sums and dropout count nothing. Batches are of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NORM = 5
"""LayerNorm and GroupNorm, per element."""
BATCH_NORM = 2
"""BatchNorm with fixed statistics, per element."""
BILINEAR = 4
"""Resize or sample, per element that it gives."""
NEAREST = 1
"""Resize that copies, per element that it gives."""

STRIDES = (4, 8, 16, 32)
"""Of the four maps of every backbone."""


@dataclass(frozen=True)
class Flops:
    """Multiply-adds for one image."""

    backbone: float
    pixel_decoder: float
    transformer_decoder: float
    inference: float = 0.0
    """Masks at input size and, for semantic segmentation, their sum over queries."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.backbone + self.pixel_decoder + self.transformer_decoder + self.inference


@dataclass(frozen=True)
class MapSize:
    """Size of a feature map, or of a sequence of tokens with width 1."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels or tokens."""
        return self.height * self.width

    def strided(self, stride: int) -> MapSize:
        """The map after a convolution of this stride that keeps borders."""
        return MapSize(math.ceil(self.height / stride), math.ceil(self.width / stride))


def pyramid(size: tuple[int, int]) -> tuple[MapSize, MapSize, MapSize, MapSize]:
    """Maps at strides 4, 8, 16 and 32 of an input of this height and width."""
    stride4, stride8, stride16, stride32 = (MapSize(*size).strided(stride) for stride in STRIDES)
    return stride4, stride8, stride16, stride32


def convolution(pixels: int, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> int:
    """Convolution that gives so many pixels; a linear layer over tokens is one of kernel 1."""
    return pixels * inputs * outputs * kernel * kernel // groups


def group_normed(pixels: int, inputs: int, outputs: int, kernel: int = 1) -> int:
    """Convolution and GroupNorm."""
    return convolution(pixels, inputs, outputs, kernel) + NORM * pixels * outputs


def attention(queries: int, keys: int, channels: int) -> int:
    """Products of queries with keys and of weights with values, all heads together."""
    return 2 * queries * keys * channels


def feed_forward(tokens: int, channels: int, hidden: int) -> int:
    """Two linear layers."""
    return 2 * tokens * channels * hidden
