"""Measured rates of a device and the time of a training step at its matrix product rate, as a reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.peers.transformers_peer import CONFIG
from m2f.model.analysis.flops.executed import build_shapes, executed_flops

PASSES = 3
"""Forward passes per training step; a backward pass counts as two."""


def describe(device: torch.device, tiny: bool) -> str:
    """Measure and describe the device in one line.

    The line states the bandwidth of a copy, the rate of a large matrix product and the time to start an operation. It
    ends with the time that an R50 training step would take at the rate of the matrix product.
    """
    has_accelerator = device.type != "cpu"
    dtype = torch.bfloat16 if has_accelerator else torch.float32
    side = 8192 if has_accelerator else 1024 if tiny else 2048
    source = torch.empty(2**28 if has_accelerator else 2**25, dtype=torch.float32, device=device)
    target, matrix, small = torch.empty_like(source), torch.randn(side, side, dtype=dtype, device=device), source[:1]
    copy_s = _seconds(lambda: target.copy_(source), device)
    product_s = _seconds(lambda: matrix @ matrix, device)
    launch_s = _seconds(lambda: [small.add(1) for _ in range(1000)], device) / 1000
    rate = 2 * side**3 / product_s
    image = (256, 256) if tiny else (1024, 1024) if has_accelerator else (512, 512)
    step = 2 * PASSES * executed_flops(build_shapes(CONFIG), image).total
    return (
        f"copy {2 * source.nbytes / copy_s / 1e9:.0f} GB/s, {str(dtype).removeprefix('torch.')} product of {side}^2 "
        f"{rate / 1e12:.2f} TFLOP/s, {1e6 * launch_s:.1f} us per operation; an R50 training step of {image[0]} x "
        f"{image[1]} needs {step / 1e12:.2f} TFLOP per image, {1e3 * step / rate:.1f} ms at that rate"
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median elapsed time in seconds of five runs, after one warm-up run."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
