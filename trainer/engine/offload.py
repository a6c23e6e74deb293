"""Optimizer whose state is kept in host memory (`training.zero.offload_optimizer`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OffloadedScalars:
    """Transfers the gradient statistics that DeepSpeed's optimizer needs to the host, in at most two copies per step.

    DeepSpeed itself synchronises with the GPU twice per parameter: in the backward pass to check whether the gradient
    is finite, and before the update to read its norm. Sums and their order are unchanged.
    """

    def __init__(self, zero: Any) -> None:
        """`zero` is DeepSpeed's optimizer."""
        self._zero = zero
        self._flags: list[Tensor] = []
        if hasattr(zero, "update_offload_overflow_tracker"):  # stage 1 and 2
            zero.update_offload_overflow_tracker = self._record_overflow

    def transfer_to_host(self) -> None:
        """Transfer the statistics. Call it between the last backward pass of a step and the update."""
        norms = self._zero.norm_for_param_grads
        if norms:
            stacked = torch.stack([norm.reshape(()) for norm in norms.values()]).cpu()
            self._zero.norm_for_param_grads = dict(zip(norms, stacked.unbind(), strict=True))
        if self._flags:
            self._zero.local_overflow = bool(torch.stack(self._flags).any())
            self._flags.clear()

    def _record_overflow(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._flags.append(self._zero._has_inf_or_nan(gradient.detach()))
