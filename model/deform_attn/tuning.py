"""Autotuning of a kernel: which of a few launch configurations is fastest on this device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch

Run = Callable[[], object]
"""Queues a kernel once."""


class LaunchConfig(NamedTuple):
    """How a kernel is cut into programs."""

    block: int
    """Queries of one program."""
    num_warps: int


class Autotuner:
    """Finds the fastest tuning of one kernel when a bucket of sizes is first seen, and remembers it in this process."""

    def __init__(self, table: Sequence[LaunchConfig], time: Callable[[Run], float]) -> None:
        """`table` with the tuning first that is taken untried; `time` gives the milliseconds of one run."""
        self.table, self._time = tuple(table), time
        self._fastest: dict[Hashable, LaunchConfig] = {}

    def choose(self, bucket: Hashable, run: Callable[[LaunchConfig], object]) -> LaunchConfig:
        """The fastest tuning for a bucket; where it is not known yet, `run` queues the kernel with one to be timed."""
        if bucket not in self._fastest:
            self._fastest[bucket] = min(self.table, key=lambda tuning: self._time(partial(run, tuning)))
        return self._fastest[bucket]


def milliseconds_on_gpu(run: Run, repeats: int = 10, rounds: int = 3) -> float:
    """Of one run: the best mean of several rounds, after one that compiles."""
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
