"""Scaling of the loss, so that small gradients do not vanish in float16 on their way back through the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Updates in a row after which twice the scale is tried. Both are those of torch's GradScaler, the official code's."""


class LossScale:
    """A power of two by which gradients are larger inside the network, halved when they overflow.

    Gradients are divided by it again, in fp32, before anyone sees those of the parameters: buckets, clipping and the
    optimizer know nothing of it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.scale = INITIAL_SCALE
        self._good_steps = 0
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / self.scale)

    def enlarge(self, total: Tensor) -> Tensor:
        """The same loss [], whose gradient is larger by the scale."""
        return _EnlargedGradient.apply(total, self.scale)

    def update(self, applied: bool) -> None:
        """After an optimizer step, which was not applied where a gradient overflowed."""
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self.scale /= 2
        elif self._good_steps == GROWTH_STEPS:
            self.scale, self._good_steps = 2 * self.scale, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.scale, self._good_steps = float(state["scale"]), int(state["good_steps"])


class _EnlargedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None
