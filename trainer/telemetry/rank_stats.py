"""What one rank measures of itself and its machine, and what follows from the numbers of all."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median_low
from typing import Literal

import psutil
import torch

from m2f.trainer.telemetry.phases import Phase

SLOW_FACTOR = 1.5
SLOW_S = 0.05
"""A rank is slow in what it does alone where it takes this much longer per step than the median rank, and so many
times as long."""


@dataclass(frozen=True)
class RankNumbers:
    """One rank since its last report. Times are seconds per step."""

    rank: int
    host: str
    step_s: float
    data_s: float
    """Waiting for its own data."""
    forward_s: float
    """Forward passes and losses: what a rank computes without the others."""
    exchange_s: float
    """Waiting for the other ranks before the forward pass."""
    process_gb: float
    """Resident memory of the process."""
    cpu_percent: float
    """Of the machine."""
    memory_percent: float
    """Of the machine."""
    disk_free_gb: float
    """Where checkpoints are written first, or in the run folder, whichever has less."""
    gpu_memory_gb: float | None = None
    """Most that tensors took since the last report."""
    gpu_image_gb: float | None = None
    """Of it, what one image of a micro-batch took: all that was gone again after the step, over the images."""
    gpu_percent: float | None = None
    """Share of time in which the GPU did something; None where the driver's library for Python is missing."""

    def values(self) -> dict[str, float]:
        """All numbers that are known."""
        return {k: v for k, v in asdict(self).items() if k not in ("rank", "host") and v is not None}


def measure_rank(
    rank: int, steps: int, phases: Mapping[Phase, float], micro_batch: int, run_folder: str
) -> RankNumbers:
    """Numbers of this process; `phases` are the seconds of all `steps`. Resets the peak of GPU memory."""
    folders = [tempfile.gettempdir(), *([] if "://" in run_folder else [run_folder])]
    gpu_memory = gpu_image = gpu_percent = None
    if torch.cuda.is_available():
        gpu_memory = torch.cuda.max_memory_allocated() / 1e9
        gpu_image = (gpu_memory - memory_gb()) / micro_batch
        torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(Exception):  # whatever a missing or broken driver library raises
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
    """What tensors take on the GPU now, else what the process takes."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def joined_numbers(numbers: Sequence[RankNumbers]) -> dict[str, float]:
    """What the log keeps of all ranks: means of use, maxima of memory, the least free disk, how far ranks differ."""
    machines = list({n.host: n for n in numbers}.values())
    alone = [n.data_s + n.forward_s for n in numbers]
    values = {
        "system/cpu_percent": fmean(n.cpu_percent for n in machines),
        "system/memory_percent": max(n.memory_percent for n in machines),
        "system/process_gb": max(n.process_gb for n in numbers),
        "system/disk_free_gb": min(n.disk_free_gb for n in machines),
        "ranks/count": float(len(numbers)),
        "ranks/slowest": float(max(range(len(alone)), key=alone.__getitem__)),
        "ranks/slowest_over_median": max(alone) / max(median_low(alone), 1e-9),
    }
    gpu_memory = [n.gpu_memory_gb for n in numbers if n.gpu_memory_gb is not None]
    gpu_percent = [n.gpu_percent for n in numbers if n.gpu_percent is not None]
    if gpu_memory:
        values["system/gpu_memory_gb"] = max(gpu_memory)
        values["system/gpu_image_gb"] = max(n.gpu_image_gb or 0.0 for n in numbers)
    if gpu_percent:
        values["system/gpu_percent"] = fmean(gpu_percent)
    return values


@dataclass(frozen=True)
class SlowRank:
    """A rank that holds the others up."""

    rank: int
    host: str
    work: Literal["data", "forward"]
    seconds: float
    usual: float
    """Of the median rank."""

    def __str__(self) -> str:
        what = "waits for data" if self.work == "data" else "computes its forward passes"
        return (
            f"rank {self.rank} on {self.host} {what} for {self.seconds:.2f} s per step, "
            f"the median rank for {self.usual:.2f} s"
        )


def slow_ranks(numbers: Sequence[RankNumbers]) -> list[SlowRank]:
    """Ranks that take much longer than the median rank for what each does alone."""
    found = []
    for work in ("data", "forward"):
        seconds = [n.data_s if work == "data" else n.forward_s for n in numbers]
        usual = median_low(seconds)
        limit = max(SLOW_FACTOR * usual, usual + SLOW_S)
        found += [SlowRank(n.rank, n.host, work, s, usual) for n, s in zip(numbers, seconds, strict=True) if s > limit]
    return found
