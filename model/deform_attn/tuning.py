"""Autotuning of a kernel: selection of the fastest launch configuration on this device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch

Run = Callable[[], object]
"""Function that queues a kernel once."""


class LaunchConfig(NamedTuple):
    """Launch configuration of a kernel."""

    block: int
    """Queries per program."""
    num_warps: int
    """Warps (32 threads each) per program."""


class Autotuner:
    """Measures the configurations of one kernel once per bucket of sizes and keeps the fastest for this process."""

    def __init__(self, table: Sequence[LaunchConfig], time: Callable[[Run], float]) -> None:
        """Create a tuner for the configurations in `table`.

        The first entry is the default used without tuning. `time` returns the milliseconds of one run.
        """
        self.table, self._time = tuple(table), time
        self._fastest: dict[Hashable, LaunchConfig] = {}

    def choose(self, bucket: Hashable, run: Callable[[LaunchConfig], object]) -> LaunchConfig:
        """Return the fastest configuration for a bucket.

        If it is not known yet, `run` is called to queue the kernel with each configuration for timing.
        """
        if bucket not in self._fastest:
            self._fastest[bucket] = min(self.table, key=lambda tuning: self._time(partial(run, tuning)))
        return self._fastest[bucket]


def milliseconds_on_gpu(run: Run, repeats: int = 10, rounds: int = 3) -> float:
    """Return the milliseconds of one run: the best mean of several rounds, after one run that compiles."""
    run()
    best = math.inf
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / repeats)
    return best
