"""Events of a run, and who receives them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, TextIO, assert_never

from m2f.data_pipeline.printable import printable
from m2f.trainer.telemetry.numbers import RankNumbers, StepMetrics, StorageTraffic, SystemUse

NoticeKind = Literal[
    "device",
    "weights",
    "resumed",
    "damaged",
    "data",
    "substituted",
    "skipped",
    "spike",
    "memory",
    "slow",
    "storage",
    "stalled",
    "drained",
    "early_stop",
    "stopped",
    "finished",
]

STALL_EXIT = 75
"""Status of a rank that ended itself after the notice `stalled`."""


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint whose manifest is written: it is complete and can be loaded by anyone."""

    step: int
    """Optimizer steps done."""
    url: str
    """Folder of the checkpoint."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.url.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class StepReport:
    """By rank 0, every `log_every_steps` optimizer steps."""

    step: int
    metrics: StepMetrics


@dataclass(frozen=True)
class RankReport:
    """By every rank, as often as StepReport: what it measured of itself."""

    step: int
    numbers: RankNumbers


@dataclass(frozen=True)
class CommitReport:
    """By every rank in the same step, after a commit."""

    checkpoint: CommittedCheckpoint


@dataclass(frozen=True)
class Notice:
    """By rank 0 (`stalled`, `storage`: any): something worth a line in the log."""

    kind: NoticeKind
    step: int
    message: str


Event = StepReport | RankReport | CommitReport | Notice


class Reporter(Protocol):
    """Receives the events of a run."""

    def report(self, event: Event) -> None:
        """Must return at once, and never raise for an outage of what is behind it."""
        ...


class Reporters:
    """Passes every event on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def report(self, event: Event) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.report(event)


class LogReporter:
    """Prints one readable line per event."""

    def __init__(self, max_steps: int, stream: TextIO | None = None) -> None:
        self.max_steps = max_steps
        self.stream = stream or sys.stdout

    def report(self, event: Event) -> None:
        """Nothing for a RankReport: the line of the StepReport covers all ranks."""
        match event:
            case StepReport(step, metrics):
                self._line(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  {_describe(metrics)}")
            case CommitReport(checkpoint):
                self._line(f"step {checkpoint.step}: checkpoint {checkpoint.url}")
            case Notice(kind, step, message):
                self._line(f"step {step}: {kind}: {message}")
            case RankReport():
                pass
            case _:
                assert_never(event)

    def _line(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)


def _describe(metrics: StepMetrics) -> str:
    """Losses, gradient norm, learning rate, images/s, time waited for data, traffic, memory, time left."""
    loss, pace = metrics.loss, metrics.throughput
    return (
        f"loss {loss.total:.4f} (class {loss.class_:.4f}, mask {loss.mask:.4f}, dice {loss.dice:.4f})"
        f"  grad {metrics.grad_norm:.3g}  lr {metrics.lr:.3g}"
        f"  {pace.images_per_s:.1f} images/s  data wait {100 * pace.data_wait_share:.0f} %"
        f"{_traffic(metrics.storage)}{_memory(metrics.system)}  left {timedelta(seconds=round(pace.eta_s))}"
    )


def _traffic(storage: StorageTraffic) -> str:
    """What was read since the last line; zero cache reads and retries are left out."""
    text = f"  read {storage.read_mb:.1f} MB"
    if storage.cached_mb:
        text += f" and {storage.cached_mb:.1f} MB cached"
    if storage.retries:
        text += f" with {storage.retries:.0f} retries"
    return text


def _memory(system: SystemUse) -> str:
    """Peak of allocated GPU memory, and of it what an image of a micro-batch took."""
    if system.gpu_memory_gb is None:
        return ""
    return f"  GPU {system.gpu_memory_gb:.1f} GB, {system.gpu_image_gb or 0.0:.2f} GB an image"
