"""Updates that the device skips by itself where a gradient is not finite, so that the host does not wait to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_QUESTIONS = ("is_invalid_grad_norm", "mask_nan_or_inf_with_val_inplace")
"""Functions by which DeepSpeed's optimizer waits for the device; both in its module for ZeRO 1 and 2."""


def device_can_decide() -> bool:
    """Whether this version of DeepSpeed asks by the functions that `DeviceSkips` knows."""
    from deepspeed.runtime.zero import stage_1_and_2

    return all(hasattr(stage_1_and_2, name) for name in _QUESTIONS)


class DeviceSkips:
    """Makes a fused AdamW leave weights, moments and step counters as they are where the gradient norm is not finite.

    DeepSpeed's optimizer of ZeRO 1 and 2 reads the norm to the host twice per parameter group and once more, and copies
    a constant to the device for every group. Its arithmetic stays; what it asks for is answered on the device.
    """

    def __init__(self, adamw: torch.optim.AdamW, zero: Any | None) -> None:
        """`zero` is DeepSpeed's optimizer around `adamw`, None without ZeRO."""
        self._adamw = adamw
        if zero is not None:
            self._measure = zero.scaled_global_norm
            zero.scaled_global_norm = self._scaled_global_norm
            zero.check_grad_overflow = False  # the norm of gradients is not finite where one of them is not

    def skip_unless_finite(self, norm: Tensor) -> None:
        """For the next update; `norm` is [], on the device."""
        # The flag by which torch's GradScaler lets fused optimizers skip; see torch.optim.Adam.step.
        self._adamw.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

    @contextmanager
    def decided_on_device(self) -> Iterator[None]:
        """Inside, DeepSpeed takes every norm for finite."""
        from deepspeed.runtime.zero import stage_1_and_2

        answers = dict(zip(_QUESTIONS, (_is_never_invalid, _mask_non_finite), strict=True))
        theirs = {name: getattr(stage_1_and_2, name) for name in answers}
        for name, answer in answers.items():
            setattr(stage_1_and_2, name, answer)
        try:
            yield
        finally:
            for name, function in theirs.items():
                setattr(stage_1_and_2, name, function)

    def _scaled_global_norm(self, *arguments: Any, **options: Any) -> Tensor:
        norm = self._measure(*arguments, **options)
        self.skip_unless_finite(norm)
        return norm


def _is_never_invalid(norm: Any) -> bool:
    return False


def _mask_non_finite(input: Tensor, device: Any = None, val: float = -1.0) -> None:  # noqa: A002 - DeepSpeed's name
    input.masked_fill_(~input.isfinite(), val)
