"""What pixel decoders have in common: their contract and their convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PixelDecoder(nn.Module):
    """Turns a backbone's maps into per-pixel embeddings and multi-scale features.

    The forward takes the maps [B, C, ., .] at strides 4, 8, 16, 32, of any size, and returns mask features
    [B, mask_dim, h, w] at stride 4 and three maps [B, feature_dim, ., .] in the order 1/32, 1/16, 1/8. Whichever of
    these are used, every parameter gets a gradient as long as the mask features are.
    """

    def __init__(self, feature_dim: int, mask_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.mask_dim = mask_dim

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`features` at strides 4, 8, 16, 32 to mask features and the maps at 1/32, 1/16, 1/8."""
        raise NotImplementedError


def run_layer(layer: nn.Module, checkpointing: bool, *inputs: Any) -> Tensor:
    """`layer(*inputs)`; with `checkpointing` only its inputs are kept, and the backward pass runs it again.

    Dropout draws the same numbers both times.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def keep_in_graph(used: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`used` as it is, whose backward pass also reaches `others`, with zeros.

    ZeRO wants a gradient for every parameter, and a transformer decoder need not read every map.
    """
    nothing = [other[:0].sum() for other in others]  # exactly 0, even where a map is not finite
    return sum(nothing, start=used)


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose result has the memory format of its input, so that convolutions after it keep theirs.

    On GPUs, torch 2.11 gives NCHW whatever it gets.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.GroupNorm
        """[B, C, H, W] to the same shape."""
        normed = super().forward(input)
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return normed.contiguous(memory_format=torch.channels_last)
        return normed


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm with 32 groups, or as many powers of two as divide `channels`."""
    return GroupNorm(math.gcd(32, channels), channels)


def convolution(in_channels: int, channels: int, kernel: int, *, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size, initialised uniformly over +-sqrt(3 / fan_in) with zero bias."""
    layer = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=bias, groups=groups)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def lateral(in_channels: int, channels: int) -> nn.Sequential:
    """Brings a backbone's map to the decoder's width: 1x1 convolution and GroupNorm."""
    return nn.Sequential(convolution(in_channels, channels, 1, bias=False), group_norm(channels))


def output(in_channels: int, channels: int) -> nn.Sequential:
    """Smooths a fused map: 3x3 convolution, GroupNorm and ReLU."""
    return nn.Sequential(convolution(in_channels, channels, 3, bias=False), group_norm(channels), nn.ReLU())


class DoubleSize(nn.ConvTranspose2d):
    """A transposed convolution of 2 x 2 pixels and stride 2 as one product of matrices.

    Its outputs do not overlap. On a CPU the backward pass of torch's own takes about twice as long for maps whose
    channels lie together, as tokens have them.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, 2, stride=2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - torch's names
        """[B, C, H, W] to [B, C', 2 H, 2 W], channels-last in memory."""
        assert self.bias is not None
        assert output_size is None
        kernel = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        pixels = F.linear(input.permute(0, 2, 3, 1), kernel, self.bias.repeat(4))
        pixels = pixels.unflatten(3, (2, 2, self.out_channels)).transpose(2, 3)
        return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
