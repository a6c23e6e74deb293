"""Replacements for a backbone's BatchNorms: frozen, synchronised over all ranks, or GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2f.model.constants import can_cache
from m2f.model.errors import ConfigError
from m2f.model.layers import GroupNorm


class _CachedConstants(NamedTuple):
    """Cached scale and shift of a frozen BatchNorm, with the buffers and versions they were computed from."""

    dtype: torch.dtype
    buffers: tuple[Tensor, ...]
    versions: list[int]
    scale_and_shift: tuple[Tensor, Tensor]

    def matches(self, dtype: torch.dtype, buffers: tuple[Tensor, ...], versions: list[int]) -> bool:
        """Return whether the constants were computed from these buffers in these versions."""
        is_same = all(mine is theirs for mine, theirs in zip(self.buffers, buffers, strict=True))
        return is_same and dtype == self.dtype and versions == self.versions


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with fixed statistics and affine parameters, all stored as buffers.

    The forward pass is one fused kernel that keeps no activation for the backward pass. The initial state is the
    identity, as in Detectron2. A new BatchNorm may have zero gains, which could never recover here.
    """

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = source.eps
        self.register_buffer("weight", torch.ones(source.num_features))
        self.register_buffer("bias", torch.zeros(source.num_features))
        self.register_buffer("running_mean", torch.zeros(source.num_features))
        self.register_buffer("running_var", torch.ones(source.num_features) - source.eps)
        self._cached: _CachedConstants | None = None

    @classmethod
    def from_trained(cls, source: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """Freeze a BatchNorm in its current state."""
        frozen = cls(source)
        for name, buffer in frozen.named_buffers():
            buffer.copy_(getattr(source, name).detach())
        return frozen

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}  # version counters start again in a copy

    def forward(self, features: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; shape and dtype stay the same.

        Writes to `.data` of a buffer are not noticed, because torch does not count them.
        """
        scale, shift = self._scale_and_shift(features.dtype)
        return torch.addcmul(shift, features, scale)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scale and shift, [1, C, 1, 1] each.

        They are recomputed only after a buffer was replaced or written to.
        """
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if not can_cache() or any(buffer.is_inference() for buffer in buffers):  # these have no version counter
            return self._make_scale_and_shift(dtype)
        versions = [buffer._version for buffer in buffers]
        if self._cached is None or not self._cached.matches(dtype, buffers, versions):
            with torch.inference_mode(False):  # autograd cannot save inference tensors for a backward pass
                self._cached = _CachedConstants(dtype, buffers, versions, self._make_scale_and_shift(dtype))
        return self._cached.scale_and_shift

    def _make_scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.to(dtype).view(1, -1, 1, 1), shift.to(dtype).view(1, -1, 1, 1)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """BatchNorm whose training statistics cover the batches of all ranks.

    torch's version supports GPUs only. On a CPU, this class computes the same sums with two all-reduces. In a single
    process, and outside training, it is a plain BatchNorm.
    """

    @classmethod
    def like(cls, source: nn.BatchNorm2d) -> SyncBatchNorm2d:
        """Create a SyncBatchNorm2d with the affine parameters and statistics of a BatchNorm."""
        norm = cls(source.num_features, eps=source.eps, momentum=source.momentum)
        norm.load_state_dict(source.state_dict())
        return norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.SyncBatchNorm
        """Normalise [B, C, H, W]; the shape stays the same. B, H and W may differ between ranks.

        Raises ConfigError in training if there is a single value per channel, which has no variance.
        """
        is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        if is_alone:  # in training, torch's version rejects CPU tensors if a process group exists
            if self.training and input.numel() == self.num_features:
                raise ConfigError(
                    "a BatchNorm of the backbone is trained on one image with one pixel at its stride, which has no "
                    "variance; train on images of more than 32 x 32 pixels, or set training.micro_batch to at least 2"
                )
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        return self._synchronised(input.float()).to(input.dtype)

    def _synchronised(self, features: Tensor) -> Tensor:
        axes = (0, 2, 3)
        count = features.new_tensor([features.numel() / self.num_features])
        sums = _AllReduceSum.apply(torch.cat((features.sum(axes), count)))
        mean, total = sums[:-1] / sums[-1], sums[-1]
        centred = features - mean.view(1, -1, 1, 1)
        variance = _AllReduceSum.apply(centred.square().sum(axes)) / total
        self._track(mean, variance * total / (total - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's output depends on every rank's input, so gradients are also summed over ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def group_norm_like(source: nn.BatchNorm2d) -> GroupNorm:
    """Return a GroupNorm with the affine parameters of a BatchNorm.

    Copying keeps the zero gains with which residual branches may start. A group has about 16 channels. With a fixed
    number of groups, a narrow stage would be normalised channel by channel.
    """
    norm = GroupNorm(math.gcd(max(1, source.num_features // 16), source.num_features), source.num_features)
    with torch.no_grad():
        norm.weight.copy_(source.weight)
        norm.bias.copy_(source.bias)
    return norm


def replace_batch_norms(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every BatchNorm below `module` with `make(norm)`.

    timm fuses dropout and activation into some norms; they follow the new norm as separate modules.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fused = [part for key in ("drop", "act") if isinstance(part := getattr(child, key, None), nn.Module)]
            setattr(module, name, nn.Sequential(make(child), *fused) if fused else make(child))
        else:
            replace_batch_norms(child, make)
