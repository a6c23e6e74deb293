"""What a backbone's BatchNorms can become: frozen, synchronised over all ranks, or GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2f.model.constants import may_keep
from m2f.model.layers import GroupNorm


class _KeptConstants(NamedTuple):
    """What a frozen BatchNorm multiplies with and adds, and what it was made from."""

    dtype: torch.dtype
    buffers: tuple[Tensor, ...]
    versions: list[int]
    scale_and_shift: tuple[Tensor, Tensor]

    def is_of(self, dtype: torch.dtype, buffers: tuple[Tensor, ...], versions: list[int]) -> bool:
        """Whether it was made from these buffers, as they were then."""
        is_same = all(mine is theirs for mine, theirs in zip(self.buffers, buffers, strict=True))
        return is_same and dtype == self.dtype and versions == self.versions


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with fixed statistics and affine, all buffers: one fused kernel that keeps no activation for backward.

    Starts as the identity, as in Detectron2; a fresh BatchNorm may have zero gains, which would never recover here.
    """

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = source.eps
        self.register_buffer("weight", torch.ones(source.num_features))
        self.register_buffer("bias", torch.zeros(source.num_features))
        self.register_buffer("running_mean", torch.zeros(source.num_features))
        self.register_buffer("running_var", torch.ones(source.num_features) - source.eps)
        self._kept: _KeptConstants | None = None

    @classmethod
    def from_trained(cls, source: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """Freeze a BatchNorm as it is."""
        frozen = cls(source)
        for name, buffer in frozen.named_buffers():
            buffer.copy_(getattr(source, name).detach())
        return frozen

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # the buffers of a copy count their writes anew

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and dtype.

        Writes to `.data` of a buffer are not seen: torch does not count them.
        """
        scale, shift = self._scale_and_shift(features.dtype)
        return torch.addcmul(shift, features, scale)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[1, C, 1, 1] each; made again only after a buffer was replaced or written to."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if not may_keep() or any(buffer.is_inference() for buffer in buffers):  # these do not count writes
            return self._make_scale_and_shift(dtype)
        versions = [buffer._version for buffer in buffers]
        if self._kept is None or not self._kept.is_of(dtype, buffers, versions):
            with torch.inference_mode(False):  # what inference makes, training could not keep for its backward pass
                self._kept = _KeptConstants(dtype, buffers, versions, self._make_scale_and_shift(dtype))
        return self._kept.scale_and_shift

    def _make_scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.to(dtype).view(1, -1, 1, 1), shift.to(dtype).view(1, -1, 1, 1)


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """BatchNorm whose training statistics cover the batches of all ranks.

    torch's own has kernels for GPUs only; on the CPU the same sums go through two all-reduces here. In one process,
    and outside of training, it is a plain BatchNorm.
    """

    @classmethod
    def like(cls, source: nn.BatchNorm2d) -> SyncBatchNorm2d:
        """Take over a BatchNorm with its affine and statistics."""
        norm = cls(source.num_features, eps=source.eps, momentum=source.momentum)
        norm.load_state_dict(source.state_dict())
        return norm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """[B, C, H, W] to the same shape; B, H and W may differ between ranks."""
        is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        if is_alone:  # torch's own refuses a CPU wherever there is a process group
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
    """Sum over ranks. Every rank's output depends on every rank's input, so gradients are summed over ranks too."""

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
    """GroupNorm in place of a BatchNorm, with its affine (residual branches may start at zero gain).

    About 16 channels a group: with a fixed number of groups, a narrow stage would be normalised channel by channel.
    """
    norm = GroupNorm(math.gcd(max(1, source.num_features // 16), source.num_features), source.num_features)
    with torch.no_grad():
        norm.weight.copy_(source.weight)
        norm.bias.copy_(source.bias)
    return norm


def replace_batch_norms(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every BatchNorm below `module`; what timm fuses into one (dropout, activation) is kept behind it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fused = [part for key in ("drop", "act") if isinstance(part := getattr(child, key, None), nn.Module)]
            setattr(module, name, nn.Sequential(make(child), *fused) if fused else make(child))
        else:
            replace_batch_norms(child, make)
