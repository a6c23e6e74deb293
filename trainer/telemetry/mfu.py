"""Model FLOPs utilisation (MFU): counted FLOPs of the model divided by the peak FLOPs of the GPUs."""

from __future__ import annotations

import re
from typing import get_args

import torch

from m2f.model.analysis.flops.executed import build_shapes, executed_flops, executed_flops_inside
from m2f.model.config import ModelConfig, ModelPart

_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 peak in TFLOP/s, from vendor data sheets. The first key that the name of the device contains applies,
unless a letter or digit follows it: L4 does not apply to an L40."""
_PASSES = 3
"""Cost of a training pass in units of forward passes. By convention the backward pass costs two: one for the gradients
of a layer's weights, and one for the gradients of its input. Recomputation by checkpointing does not count."""


def peak_flops(device_name: str) -> float | None:
    """Return the peak bf16 FLOP/s of a GPU, given its name as CUDA reports it; None if it is unknown."""
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS.items() if re.search(rf"{name}(?!\w)", device_name)), None)


def training_multiply_adds(config: ModelConfig, size: tuple[int, int]) -> float:
    """Return the multiply-adds of a forward and a backward pass for one image of `size` (height, width).

    A frozen part computes no weight gradients, and no gradients at all if no part before it is trained.
    """
    model = build_shapes(config)
    flops = executed_flops(model, size)
    total, is_trained_before = 0.0, False
    for part in get_args(ModelPart):
        is_frozen = part in config.freeze
        total += getattr(flops, part) * (_PASSES if not is_frozen else 2 if is_trained_before else 1)
        is_trained_before |= not is_frozen
    inside = [part for part in config.freeze if "." in part and part.partition(".")[0] not in config.freeze]
    return total - (_PASSES - 1) * sum(executed_flops_inside(model, size, part) for part in inside)


class Utilization:
    """Model FLOPs divided by the peak of all GPUs in bf16, regardless of the run's precision.

    FLOPs are counted once per input size, on tensors without values. This takes seconds and is skipped if the peak is
    unknown.
    """

    def __init__(self, config: ModelConfig, device: torch.device, world_size: int) -> None:
        self._config = config
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._world_size = world_size
        self._flops_of: dict[tuple[int, int], float] = {}

    def share(self, size: tuple[int, int], images_per_s: float) -> float | None:
        """Return the MFU, 0 to 1, at this height, width and throughput of all ranks; None if the peak is unknown."""
        if self._peak is None:
            return None
        if size not in self._flops_of:
            self._flops_of[size] = 2 * training_multiply_adds(self._config, size)
        return self._flops_of[size] * images_per_s / (self._peak * self._world_size)
