"""What this device can do at best: the figures to hold all others against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def describe(device: torch.device, tiny: bool) -> str:
    """Bandwidth of a copy, throughput of a large matrix product, and the cost of starting an operation."""
    accelerated = device.type != "cpu"
    dtype = torch.bfloat16 if accelerated else torch.float32
    side = 8192 if accelerated else 1024 if tiny else 2048
    source = torch.empty(2**28 if accelerated else 2**25, dtype=torch.float32, device=device)
    target, matrix, small = torch.empty_like(source), torch.randn(side, side, dtype=dtype, device=device), source[:1]
    copied = _seconds(lambda: target.copy_(source), device)
    product = _seconds(lambda: matrix @ matrix, device)
    launched = _seconds(lambda: [small.add(1) for _ in range(1000)], device) / 1000
    return (
        f"copy {2 * source.nbytes / copied / 1e9:.0f} GB/s, {str(dtype).removeprefix('torch.')} product of {side}^2 "
        f"{2 * side**3 / product / 1e12:.2f} TFLOP/s, {1e6 * launched:.1f} us per operation"
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of five runs after one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
