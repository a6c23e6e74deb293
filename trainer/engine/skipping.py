"""Optimizer updates without host synchronisation and with few host calls, without ZeRO or with ZeRO 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_CHECK_FUNCTION = "is_invalid_grad_norm"
"""Function in DeepSpeed's module for ZeRO 1 and 2 with which its optimizer waits for the device."""


def device_can_decide() -> bool:
    """Return whether this version of DeepSpeed has the function that `DeviceSkips` replaces."""
    from deepspeed.runtime.zero import stage_1_and_2

    return hasattr(stage_1_and_2, _CHECK_FUNCTION)


class DeviceSkips:
    """Makes a fused AdamW leave weights, moments and step counters unchanged if the gradient norm is not finite.

    DeepSpeed's optimizer of ZeRO 1 and 2 copies the norm to the host twice per parameter group, and once more for the
    step. It also copies a constant to the device for every group. For every tensor, it makes one call to compute the
    norm and one to link the tensor to its flat buffer. This class avoids these calls. The arithmetic is unchanged.
    """

    def __init__(self, adamw: torch.optim.AdamW, zero: Any | None) -> None:
        """Install the replacements. `zero` is DeepSpeed's optimizer around `adamw`; None without ZeRO."""
        self._adamw, self._zero = adamw, zero
        if zero is not None:
            self._original_norm = zero.scaled_global_norm
            zero.scaled_global_norm = self._scaled_global_norm
            zero.check_grad_overflow = False  # the norm is not finite if any gradient is not
            zero.get_grad_norm_direct = self._norm_of_group

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Skip the next update if `norm` is not finite; `norm` is [], on the device."""
        # torch's GradScaler uses this attribute to let fused optimizers skip an update; see torch.optim.Adam.step.
        self._adamw.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

    @contextmanager
    def decided_on_device(self) -> Iterator[None]:
        """In this context, DeepSpeed treats every norm as finite and keeps the weights as views of its flat buffers."""
        from deepspeed.runtime.zero import stage_1_and_2

        zero = self._zero
        assert zero is not None
        original = getattr(stage_1_and_2, _CHECK_FUNCTION)
        setattr(stage_1_and_2, _CHECK_FUNCTION, _is_never_invalid)
        zero._update_model_bit16_weights = _keep_views
        try:
            yield
        finally:
            del zero._update_model_bit16_weights
            setattr(stage_1_and_2, _CHECK_FUNCTION, original)

    def _scaled_global_norm(self, *arguments: Any, **options: Any) -> Tensor:
        norm = self._original_norm(*arguments, **options)
        self.skip_unless_finite(norm)
        return norm

    def _norm_of_group(self, gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
        """Return the L2 norm of a parameter group's gradients over all ranks.

        It is [] float32 on the device, and finite if all gradients are. Replaces DeepSpeed's `get_grad_norm_direct`
        with one call for all tensors. Norms of tensors are float64.
        """
        import deepspeed.comm

        assert self._zero is not None
        unpadded = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        own_gradients = unpadded[: len(params)]
        total = torch.zeros((), device=self._zero.device)
        if own_gradients:
            norms = torch._foreach_norm(own_gradients, 2.0, dtype=torch.float64)
            total = torch.stack(norms).pow(2.0).sum().float()
        deepspeed.comm.all_reduce(total, op=deepspeed.comm.ReduceOp.SUM, group=self._zero.dp_process_group)
        return total.pow(0.5)


def _is_never_invalid(norm: Any) -> bool:
    return False


def _keep_views(group_index: int) -> None:
    pass
