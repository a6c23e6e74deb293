"""Compare our code with a peer in one process: check that both agree, then time them in turn."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import peak_growth

CPU = torch.device("cpu")

Run = Callable[[], Sequence[Tensor]]
"""A function to time; returns the tensors that must agree on both sides."""


class Times(NamedTuple):
    """Milliseconds over several runs. `compare` measures CPU time on a CPU and elapsed time on an accelerator."""

    median: float
    quartiles: tuple[float, float]
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Compute the statistics of the `seconds` of at least one run."""
        if len(seconds) == 1:
            seconds = [*seconds, *seconds]
        cuts = [round(1000 * cut, 4) for cut in statistics.quantiles(seconds, n=20, method="inclusive")]
        return cls(cuts[9], (cuts[4], cuts[14]), cuts[18])

    def per(self, count: int) -> Times:
        """Return the times of one of `count` equal parts."""
        return Times(self.median / count, (self.quartiles[0] / count, self.quartiles[1] / count), self.p95 / count)


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    case: str
    """Name of the benchmark, with the precision if there are several."""
    shape: str
    ours: Times
    peer: str
    theirs: Times
    error: float
    """Largest difference of the results, relative to the peer's largest value."""
    ours_gb: float | None = None
    """Memory in GiB that our run adds at its peak; None if not measured."""
    peer_gb: float | None = None
    floor_ms: float | None = None
    """Milliseconds of our run that any implementation needs; None if not measured."""
    ours_waits: int | None = None
    """How often our run makes the host wait for the device, counted by PyTorch; None on a CPU."""
    peer_waits: int | None = None

    @property
    def ratio(self) -> float:
        """Median time of the peer over ours; above 1, ours is faster."""
        return self.theirs.median / self.ours.median

    @property
    def floor_share(self) -> float | None:
        """Share of our median time that any implementation needs; None if not measured."""
        return None if self.floor_ms is None else self.floor_ms / self.ours.median


def compare(
    case: str,
    shape: str,
    ours: Run,
    peer_name: str,
    peer: Run,
    tolerance: float,
    repeats: int,
    device: torch.device = CPU,
    memory: bool = False,
) -> Measurement:
    """Check that both sides agree, then time them in turn.

    The check runs without TF32; the timed runs use the current setting. With `memory`, also measure the memory that
    each side adds at its peak. Raises AssertionError if the relative error exceeds `tolerance`.
    """
    with without_tf32():
        error = max(relative_error(a, b) for a, b in zip(ours(), peer(), strict=True))
    assert error <= tolerance, f"{case} {shape}: ours and {peer_name} differ by {error:.1e}, more than {tolerance:.1e}"
    if device.type != "cpu":  # changing TF32 triggers a recompilation, which must not be part of the timing
        ours(), peer()
    our_times, peer_times = time_interleaved(ours, peer, repeats, clock_of(device))
    result = Measurement(case, shape, our_times, peer_name, peer_times, error)
    if memory:
        result = replace(result, ours_gb=peak_growth(ours, device), peer_gb=peak_growth(peer, device))
    return replace(result, ours_waits=count_waits(ours, device), peer_waits=count_waits(peer, device))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 for fp32 matrix products and convolutions on GPUs; convolutions use it by default."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    try:
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds.

    On a CPU it is the process's CPU time, which other processes affect little. On an accelerator it is the elapsed time
    after its queued work has finished.
    """
    if device.type == "cpu":
        return time.process_time

    def synchronized_time() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronized_time


def time_interleaved(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> tuple[Times, Times]:
    """Run both in turn, `repeats` times each, and return their times."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, run_seconds in zip((ours, peer), seconds, strict=True):
            start = clock()
            run()
            run_seconds.append(clock() - start)
    return Times.of(seconds[0]), Times.of(seconds[1])


def count_waits(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how often PyTorch makes the host wait for a GPU inside `run`; None on other devices.

    Waits for events are not counted.
    """
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def relative_error(ours: Tensor, peer: Tensor) -> float:
    """Return the largest absolute difference, divided by the peer's largest absolute value."""
    scale = float(peer.detach().abs().max()) or 1.0
    return float((ours.detach() - peer.detach()).abs().max()) / scale
