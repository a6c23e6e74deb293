"""Exponential moving average (EMA) of the weights, which often scores better in evaluations than the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class WeightAverage:
    """Average of all trainable weights in fp32. Each rank keeps an equal part of each weight under any ZeRO stage.

    With `training.precision` bf16 or fp16, the rounded 16-bit weights are averaged, not the optimizer's fp32 copies.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start at the current weights. The parameters must already be partitioned and on their final device."""
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.decay = decay
        self._parts = {name: _own_part(p).float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after optimizer step number `step`. The decay increases with `step`, so early weights fade quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [_own_part(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._parts.values()), current, 1 - decay)

    def gather(self) -> dict[str, Tensor]:
        """Return the averages on CPU on rank 0, and an empty dict on other ranks. Every rank must call it."""
        averages = {}
        for name, parameter in self._parameters.items():
            part, shape = self._parts[name], _whole_shape(parameter)
            size = _part_size(parameter)
            part = F.pad(part, (0, size - part.numel()))
            first = dist.get_rank() == 0
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if first else None
            dist.gather(part, parts, dst=0)
            if parts is not None:
                averages[name] = torch.cat(parts)[: shape.numel()].view(shape).cpu()
        return averages

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Restore this rank's part of an earlier result of `gather`, from any number of ranks."""
        for name, part in self._parts.items():
            start = _part_size(self._parameters[name]) * dist.get_rank()
            own_weights = weights[name].flatten()[start : start + part.numel()]
            part[: own_weights.numel()] = own_weights


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter, 1-D; under ZeRO-3 it is DeepSpeed's own partition, including padding."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()  # type: ignore[attr-defined]
    size = _part_size(parameter)
    return parameter.detach().flatten()[size * dist.get_rank() :][:size]


def _part_size(parameter: nn.Parameter) -> int:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    return -(-parameter.numel() // dist.get_world_size())


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
