"""Ours and a peer side by side in one process: agreement first, then interleaved times and their ratio."""

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
"""One measured piece of work; returns what both sides must agree on."""


class Times(NamedTuple):
    """Milliseconds of several runs: CPU time on a CPU, elapsed time on an accelerator."""

    median: float
    quartiles: tuple[float, float]
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """From at least one run."""
        if len(seconds) == 1:
            seconds = [*seconds, *seconds]
        cuts = [round(1000 * cut, 4) for cut in statistics.quantiles(seconds, n=20, method="inclusive")]
        return cls(cuts[9], (cuts[4], cuts[14]), cuts[18])

    def per(self, count: int) -> Times:
        """Of one of `count` equal parts."""
        return Times(self.median / count, (self.quartiles[0] / count, self.quartiles[1] / count), self.p95 / count)


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    case: str
    """With the precision where there are several."""
    shape: str
    ours: Times
    peer: str
    theirs: Times
    error: float
    """Largest difference of the results, relative to the peer's largest value."""
    ours_gb: float | None = None
    """GiB that ours adds at its peak."""
    peer_gb: float | None = None
    floor_ms: float | None = None
    """Milliseconds of ours that any implementation needs."""
    ours_waits: int | None = None
    """How often ours makes the host wait for the device, by PyTorch's own count; None on a CPU."""
    peer_waits: int | None = None

    @property
    def ratio(self) -> float:
        """How many times less time ours needs."""
        return self.theirs.median / self.ours.median

    @property
    def floor_share(self) -> float | None:
        """Share of our time that any implementation needs."""
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
    """Check agreement, then time both in turn. Raises AssertionError where they disagree: no ratio without equality.

    The check is made without TF32, times are measured with what is set. `memory`: measure what each adds at its peak as
    well.
    """
    with without_tf32():
        error = max(relative_error(a, b) for a, b in zip(ours(), peer(), strict=True))
    assert error <= tolerance, f"{case} {shape}: ours and {peer_name} differ by {error:.1e}, more than {tolerance:.1e}"
    if device.type != "cpu":  # what was compiled for the check is compiled again without it
        ours(), peer()
    our_times, peer_times = interleaved(ours, peer, repeats, _clock(device))
    result = Measurement(case, shape, our_times, peer_name, peer_times, error)
    if memory:
        result = replace(result, ours_gb=peak_growth(ours, device), peer_gb=peak_growth(peer, device))
    return replace(result, ours_waits=count_waits(ours, device), peer_waits=count_waits(peer, device))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of fp32 on GPUs keep all digits; convolutions round to TF32 otherwise."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    try:
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU time, which neighbours on the machine do not change; on an accelerator the time when its work is done."""
    if device.type == "cpu":
        return time.process_time

    def done() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return done


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> tuple[Times, Times]:
    """Times of both, run in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, of_run in zip((ours, peer), seconds, strict=True):
            start = clock()
            run()
            of_run.append(clock() - start)
    return Times.of(seconds[0]), Times.of(seconds[1])


def count_waits(run: Callable[[], object], device: torch.device) -> int | None:
    """How often PyTorch makes the host wait for a GPU inside `run` (waits for events are not counted)."""
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
    """Largest difference, relative to the peer's largest value."""
    scale = float(peer.detach().abs().max()) or 1.0
    return float((ours.detach() - peer.detach()).abs().max()) / scale
