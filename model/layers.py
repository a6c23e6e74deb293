"""Base class and convolution blocks of the pixel decoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PixelDecoder(nn.Module):
    """Turns a backbone's maps into per-pixel embeddings and multi-scale features.

    The forward pass takes maps [B, C_i, ., .] at strides 4, 8, 16 and 32 of any size. It returns mask features
    [B, mask_dim, h, w] at stride 4 and three maps [B, feature_dim, ., .] in the order 1/32, 1/16, 1/8. If the loss uses
    the mask features, every parameter gets a gradient, even if the three maps are unused.
    """

    def __init__(self, feature_dim: int, mask_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.mask_dim = mask_dim

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and the maps at 1/32, 1/16, 1/8 from `features` at strides 4, 8, 16, 32."""
        raise NotImplementedError


def run_layer(layer: Callable[..., Tensor], checkpointing: bool, *inputs: Any) -> Tensor:
    """Return `layer(*inputs)`. With `checkpointing`, keep only the inputs and run the layer again in the backward pass.

    Dropout draws the same numbers in both runs.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def keep_in_graph(used: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return `used` unchanged and connect `others` to its graph with zero gradients.

    ZeRO needs a gradient for every parameter, but some transformer decoders do not read every map.
    """
    nothing = [other[:0].sum() for other in others]  # sums of empty slices: exactly 0 even if a map is not finite
    return sum(nothing, start=used)


def relu_of_new(values: Tensor) -> Tensor:
    """Return the ReLU of a tensor that nothing else reads. Without gradients, it is computed in place."""
    return values.relu() if torch.is_grad_enabled() else values.relu_()


class Table(nn.Embedding):
    """Learned rows of which every forward pass uses all, so that no indices are needed."""

    # pyrefly: ignore[bad-override] - the input of nn.Embedding is missing on purpose
    def forward(self) -> Tensor:
        """Return the rows [N, C]."""
        rows = self.weight.view_as(self.weight)  # because ZeRO-3 empties the parameter itself when this call ends
        # In inference mode, a view of a parameter requires gradients but has no function for them, which torch's
        # FlopCounterMode does not support.
        return rows if torch.is_grad_enabled() else rows.detach()


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps the memory format of its input, so that later convolutions run in this format.

    On GPUs, GroupNorm of torch 2.11 always returns NCHW. Groups may have a single value, which becomes 0 before the
    affine map: narrow maps of small images have such groups, and `nn.GroupNorm` refuses them.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.GroupNorm
        """Normalise [B, C, H, W]; the shape stays the same."""
        is_cudnn_on = torch.backends.cudnn.enabled
        normed = torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, is_cudnn_on)
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return normed.contiguous(memory_format=torch.channels_last)
        return normed


def group_norm(channels: int) -> GroupNorm:
    """Return a GroupNorm with 32 groups, or with the largest power of two below 32 that divides `channels`."""
    return GroupNorm(math.gcd(32, channels), channels)


def convolution(in_channels: int, channels: int, kernel: int, *, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the spatial size.

    Weights are uniform within +-sqrt(3 / fan_in); the bias is zero.
    """
    layer = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=bias, groups=groups)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def lateral(in_channels: int, channels: int) -> nn.Sequential:
    """Return a 1x1 convolution and GroupNorm that bring a backbone's map to the decoder's width."""
    return nn.Sequential(convolution(in_channels, channels, 1, bias=False), group_norm(channels))


def output(in_channels: int, channels: int) -> nn.Sequential:
    """Return a 3x3 convolution, GroupNorm and ReLU that smooth a fused map."""
    return nn.Sequential(convolution(in_channels, channels, 3, bias=False), group_norm(channels), nn.ReLU())


class DoubleSize(nn.ConvTranspose2d):
    """Transposed convolution with a 2 x 2 kernel and stride 2 of channels-last maps, the layout that tokens have.

    Outputs do not overlap, so one matrix product computes them. On CPUs without AVX-512, the backward pass of torch's
    own layer takes about twice as long as the product. On an AMD EPYC with AVX-512, it takes 0.6 to 0.7 of the time.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, 2, stride=2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - torch's names
        """Upsample [B, C, H, W] to [B, C', 2 H, 2 W], channels-last in memory if the input is."""
        assert self.bias is not None
        assert output_size is None
        if input.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
            return super().forward(input)
        kernel = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        pixels = F.linear(input.permute(0, 2, 3, 1), kernel, self.bias.repeat(4))
        pixels = pixels.unflatten(3, (2, 2, self.out_channels)).transpose(2, 3)
        return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
