"""Ours and a peer side by side in one process: agreement first, then interleaved CPU times and their ratio."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]
"""One measured piece of work; returns what both sides must agree on."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    shape: str
    ours_ms: float
    """Median CPU milliseconds."""
    peer: str
    peer_ms: float
    error: float
    """Largest difference of the results, relative to the peer's largest value."""

    @property
    def ratio(self) -> float:
        """How many times less CPU time ours needs."""
        return self.peer_ms / self.ours_ms


def compare(case: str, shape: str, ours: Run, peer_name: str, peer: Run, tolerance: float, repeats: int) -> Row:
    """Check agreement, then time both in turn. Raises AssertionError where they disagree: no ratio without equality."""
    error = max(_relative(a, b) for a, b in zip(ours(), peer(), strict=True))
    assert error <= tolerance, f"{case} {shape}: ours and {peer_name} differ by {error:.1e}, more than {tolerance:.1e}"
    times: dict[Run, list[float]] = {ours: [], peer: []}
    for _ in range(repeats):
        for run, seconds in times.items():
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    ours_ms, peer_ms = (1000 * statistics.median(seconds) for seconds in times.values())
    return Row(case, shape, ours_ms, peer_name, peer_ms, error)


def report(rows: Sequence[Row]) -> str:
    """A Markdown table under a line about the machine, then one JSON line per row."""
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
    ]
    lines += ["", "| case | shape | ours ms | peer | peer ms | ratio | rel. error |", "|---|---|--:|---|--:|--:|--:|"]
    lines += [
        f"| {r.case} | {r.shape} | {r.ours_ms:.1f} | {r.peer} | {r.peer_ms:.1f} | {r.ratio:.2f} | {r.error:.0e} |"
        for r in rows
    ]
    return "\n".join([*lines, "", *(json.dumps(asdict(r)) for r in rows)])


def _relative(ours: Tensor, peer: Tensor) -> float:
    scale = float(peer.detach().abs().max()) or 1.0
    return float((ours.detach() - peer.detach()).abs().max()) / scale
