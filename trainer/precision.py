"""Which precision suits which devices (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from m2f.trainer.config import Precision

Capability = tuple[int, int]
"""Of a GPU: CUDA's number of what it can do."""
_BF16: Capability = (8, 0)
_TENSOR_CORES: Capability = (7, 0)


def sensible_precision(capabilities: Sequence[Capability]) -> Precision:
    """What `training.precision: auto` means on these GPUs; none: the CPU."""
    least = min(capabilities, default=(0, 0))
    if least >= _BF16:
        return "bf16_autocast"
    return "fp16_autocast" if least >= _TENSOR_CORES else "fp32"
