"""Measurements of one rank and its machine, and statistics over all ranks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Literal

import psutil
import torch

from m2f.trainer.telemetry.numbers import NodeUse, RankNumbers, RankSpread, SystemUse
from m2f.trainer.telemetry.phases import Phase

SLOW_FACTOR, SLOW_S = 1.5, 0.05
"""A rank is slow if its own work takes more than SLOW_FACTOR times as long as on the median rank, and more than SLOW_S
seconds per step longer."""


def measure_rank(
    rank: int, steps: int, phases: Mapping[Phase, float], micro_batch: int, run_folder: str
) -> RankNumbers:
    """Measure this process. `phases` holds the seconds of all `steps` together. Resets the peak of GPU memory."""
    folders = [tempfile.gettempdir(), *([] if "://" in run_folder else [run_folder])]
    gpu_memory = gpu_image = gpu_percent = None
    if torch.cuda.is_available():
        gpu_memory = torch.cuda.max_memory_allocated() / 1e9
        gpu_image = (gpu_memory - memory_gb()) / micro_batch
        torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(Exception):  # a missing or broken driver library can raise anything
            gpu_percent = float(torch.cuda.utilization())
    return RankNumbers(
        rank=rank,
        host=socket.gethostname(),
        step_s=sum(phases.values()) / steps,
        data_s=phases.get("data", 0.0) / steps,
        forward_s=phases.get("forward", 0.0) / steps,
        exchange_s=phases.get("exchange", 0.0) / steps,
        process_gb=psutil.Process().memory_info().rss / 1e9,
        cpu_percent=psutil.cpu_percent(),
        memory_percent=psutil.virtual_memory().percent,
        disk_free_gb=min(shutil.disk_usage(folder).free for folder in folders) / 1e9,
        gpu_memory_gb=gpu_memory,
        gpu_image_gb=gpu_image,
        gpu_percent=gpu_percent,
    )


def memory_gb() -> float:
    """Return the GB of tensors on the GPU; without a GPU, the resident memory of the process in GB."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def system_use(numbers: Sequence[RankNumbers]) -> SystemUse:
    """Summarise the machines of all ranks."""
    machines = list({n.host: n for n in numbers}.values())
    gpu_memory = [n.gpu_memory_gb for n in numbers if n.gpu_memory_gb is not None]
    gpu_percent = [n.gpu_percent for n in numbers if n.gpu_percent is not None]
    return SystemUse(
        cpu_percent=fmean(n.cpu_percent for n in machines),
        memory_percent=max(n.memory_percent for n in machines),
        process_gb=max(n.process_gb for n in numbers),
        disk_free_gb=min(n.disk_free_gb for n in machines),
        gpu_memory_gb=max(gpu_memory) if gpu_memory else None,
        gpu_image_gb=max(n.gpu_image_gb or 0.0 for n in numbers) if gpu_memory else None,
        gpu_percent=fmean(gpu_percent) if gpu_percent else None,
    )


def node_uses(numbers: Sequence[RankNumbers]) -> tuple[NodeUse, ...]:
    """Return the use of each machine, ordered by host."""
    return tuple(_node_use(host, [n for n in numbers if n.host == host]) for host in sorted({n.host for n in numbers}))


def _node_use(host: str, ranks: Sequence[RankNumbers]) -> NodeUse:
    gpu_memory = [n.gpu_memory_gb for n in ranks if n.gpu_memory_gb is not None]
    gpu_percent = [n.gpu_percent for n in ranks if n.gpu_percent is not None]
    return NodeUse(
        host=host,
        cpu_percent=fmean(n.cpu_percent for n in ranks),
        memory_percent=max(n.memory_percent for n in ranks),
        process_gb=sum(n.process_gb for n in ranks),
        disk_free_gb=min(n.disk_free_gb for n in ranks),
        gpu_memory_gb=max(gpu_memory, default=None),
        gpu_percent=fmean(gpu_percent) if gpu_percent else None,
    )


def rank_spread(numbers: Sequence[RankNumbers], slow: int) -> RankSpread:
    """Compare the ranks by the work that each does alone. `slow` counts ranks slow in several consecutive reports."""
    alone = [n.data_s + n.forward_s for n in numbers]
    slowest = max(range(len(alone)), key=alone.__getitem__)
    ratio = max(alone) / max(median_low(alone), 1e-9)
    return RankSpread(float(len(numbers)), float(slowest), ratio, float(slow))


@dataclass(frozen=True)
class SlowRank:
    """A rank that delays the others. Times are seconds per step."""

    rank: int
    host: str
    work: Literal["data", "forward"]
    seconds: float
    median: float
    """Time of the median rank."""

    def __str__(self) -> str:
        activity = "waiting for data" if self.work == "data" else "on forward passes"
        return (
            f"rank {self.rank} on {self.host} spends {self.seconds:.2f} s per step {activity}, "
            f"the median rank {self.median:.2f} s"
        )


def slow_ranks(numbers: Sequence[RankNumbers]) -> list[SlowRank]:
    """Return the ranks whose own work takes much longer than that of the median rank (SLOW_FACTOR, SLOW_S)."""
    found = []
    for work in ("data", "forward"):
        seconds = [n.data_s if work == "data" else n.forward_s for n in numbers]
        median = median_low(seconds)
        limit = max(SLOW_FACTOR * median, median + SLOW_S)
        found += [SlowRank(n.rank, n.host, work, s, median) for n, s in zip(numbers, seconds, strict=True) if s > limit]
    return found
