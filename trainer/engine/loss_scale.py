"""Dynamic loss scaling, so that small gradients do not underflow in float16 during the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INITIAL_SCALE, GROWTH_STEPS = 2.0**16, 2000
"""First scale, and consecutive applied updates after which it doubles. Both values are those of torch's GradScaler, as
in the official code."""


class LossScale:
    """A power of two that scales gradients inside the network. It is halved when they overflow.

    Gradients of parameters are divided by the scale in fp32 as soon as they are computed. Buckets, clipping and the
    optimizer see unscaled gradients only.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.scale = INITIAL_SCALE
        self._good_steps = 0
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / self.scale)

    def scale_gradients(self, total: Tensor) -> Tensor:
        """Return the loss, [], unchanged in value, with a gradient that is multiplied by the scale."""
        return _ScaledGradients.apply(total, self.scale)

    def update(self, applied: bool) -> None:
        """Adapt the scale after an optimizer step; `applied` is False if a gradient overflowed."""
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self.scale /= 2
        elif self._good_steps == GROWTH_STEPS:
            self.scale, self._good_steps = 2 * self.scale, 0

    def state(self) -> dict[str, float]:
        """Return the state to store in a checkpoint."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore the state from a checkpoint."""
        self.scale, self._good_steps = float(state["scale"]), int(state["good_steps"])


class _ScaledGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None
