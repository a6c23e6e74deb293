"""The precision that suits the devices, and the bytes of fp32 values. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from m2f.trainer.config import Precision

FP32_BYTES = 4
"""Bytes of a weight or gradient in fp32."""
ADAM_BYTES = 2 * FP32_BYTES
"""Bytes of AdamW's two moments per trained weight. They are in fp32 in every precision."""
Capability = tuple[int, int]
"""CUDA compute capability of a GPU, major and minor."""
_BF16: Capability = (8, 0)
_TENSOR_CORES: Capability = (7, 0)


def default_precision(capabilities: Sequence[Capability]) -> Precision:
    """Return the precision that `training.precision: auto` selects for these GPUs.

    The oldest GPU decides. An empty sequence stands for the CPU.
    """
    lowest = min(capabilities, default=(0, 0))
    if lowest >= _BF16:
        return "bf16_autocast"
    return "fp16_autocast" if lowest >= _TENSOR_CORES else "fp32"
