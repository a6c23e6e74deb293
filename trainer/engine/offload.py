"""An optimizer whose state lies in the host's memory (`training.zero.offload_optimizer`)."""

from __future__ import annotations

from typing import Any

import torch


def bring_norms_to_host(optimizer: Any) -> None:
    """Copy the gradient norms of all parameters to the host at once, before DeepSpeed's optimizer adds them up.

    It would ask the GPU for each by itself, and wait as often as there are parameters. Sums and their order stay.
    """
    norms = optimizer.norm_for_param_grads
    if norms:
        together = torch.stack([norm.reshape(()) for norm in norms.values()]).cpu()
        optimizer.norm_for_param_grads = dict(zip(norms, together.unbind(), strict=True))
