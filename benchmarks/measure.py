"""Ours and a peer side by side in one process: agreement first, then interleaved times and their ratio."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")

Run = Callable[[], Sequence[Tensor]]
"""One measured piece of work; returns what both sides must agree on."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    shape: str
    ours_ms: float
    """Median milliseconds: CPU time on a CPU, elapsed time on an accelerator."""
    peer: str
    peer_ms: float
    error: float
    """Largest difference of the results, relative to the peer's largest value."""
    ours_gb: float | None = None
    """GiB that ours adds at its peak."""
    peer_gb: float | None = None
    floor_ms: float | None = None
    """Milliseconds of ours that any implementation needs."""

    @property
    def ratio(self) -> float:
        """How many times less time ours needs."""
        return self.peer_ms / self.ours_ms


def compare(
    case: str,
    shape: str,
    ours: Run,
    peer_name: str,
    peer: Run,
    tolerance: float,
    repeats: int,
    device: torch.device = CPU,
) -> Row:
    """Check agreement, then time both in turn. Raises AssertionError where they disagree: no ratio without equality."""
    error = max(_relative(a, b) for a, b in zip(ours(), peer(), strict=True))
    assert error <= tolerance, f"{case} {shape}: ours and {peer_name} differ by {error:.1e}, more than {tolerance:.1e}"
    ours_ms, peer_ms = interleaved(ours, peer, repeats, _clock(device))
    return Row(case, shape, ours_ms, peer_name, peer_ms, error)


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
) -> tuple[float, float]:
    """Median milliseconds of both, run in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, of_run in zip((ours, peer), seconds, strict=True):
            start = clock()
            run()
            of_run.append(clock() - start)
    ours_ms, peer_ms = (1000 * statistics.median(of_run) for of_run in seconds)
    return ours_ms, peer_ms


def report(rows: Sequence[Row], device: torch.device = CPU) -> str:
    """A Markdown table under a line about the machine, then one JSON line per row."""
    head = "| case | shape | ours ms | peer | peer ms | ratio | ours GB | peer GB | share | floor | rel. error |"
    lines = [
        f"{_machine(device)}, torch {torch.__version__}",
        "",
        head,
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(_line, rows), "", *(json.dumps(asdict(r)) for r in rows)])


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread"


def _line(row: Row) -> str:
    memory = ["", "", ""]
    if row.ours_gb is not None and row.peer_gb is not None:
        memory = [f"{row.ours_gb:.2f}", f"{row.peer_gb:.2f}", f"{row.ours_gb / row.peer_gb:.2f}"]
    floor = "" if row.floor_ms is None else f"{row.floor_ms / row.ours_ms:.0%}"
    times = [f"{row.ours_ms:.1f}", row.peer, f"{row.peer_ms:.1f}", f"{row.ratio:.2f}"]
    return f"| {' | '.join([row.case, row.shape, *times, *memory, floor, f'{row.error:.0e}'])} |"


def _relative(ours: Tensor, peer: Tensor) -> float:
    scale = float(peer.detach().abs().max()) or 1.0
    return float((ours.detach() - peer.detach()).abs().max()) / scale
