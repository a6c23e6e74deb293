"""Events of a run, and the interface of their receivers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, TextIO, assert_never

from m2f.data_pipeline.printable import print_line
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
"""Exit status of a rank that ended itself after the notice `stalled`."""


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint whose manifest is written, so it is complete and can be loaded by any process."""

    step: int
    """Optimizer steps done."""
    url: str
    """Folder of the checkpoint."""

    @property
    def name(self) -> str:
        """Last part of `url`, for example `step_00000042-3`."""
        return self.url.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class StepReport:
    """Metrics of all ranks, sent by rank 0 every `log_every_steps` optimizer steps."""

    step: int
    metrics: StepMetrics


@dataclass(frozen=True)
class RankReport:
    """Measurements of one rank, sent by every rank as often as StepReport."""

    step: int
    numbers: RankNumbers


@dataclass(frozen=True)
class CommitReport:
    """A newly committed checkpoint, sent by every rank in the same step."""

    checkpoint: CommittedCheckpoint


@dataclass(frozen=True)
class Notice:
    """A line for the log, sent by rank 0; `stalled` and `storage` are sent by any rank."""

    kind: NoticeKind
    step: int
    message: str


Event = StepReport | RankReport | CommitReport | Notice


class Reporter(Protocol):
    """Receives the events of a run."""

    def report(self, event: Event) -> None:
        """Handle `event`. Must not block, and must not raise if the service that it reports to is down."""
        ...


class Reporters:
    """Passes every event on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def report(self, event: Event) -> None:
        """Pass `event` to all reporters."""
        for reporter in self._reporters:
            reporter.report(event)


class LogReporter:
    """Prints one readable line per event."""

    def __init__(self, max_steps: int, stream: TextIO | None = None) -> None:
        self.max_steps = max_steps
        self.stream = stream or sys.stdout

    def report(self, event: Event) -> None:
        """Print one line for `event`. Ignores RankReport, because StepReport covers all ranks."""
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
        print_line(self.stream, text)


def _describe(metrics: StepMetrics) -> str:
    """Return losses, gradient norm, learning rate, images/s, data wait, traffic, memory and remaining time as text."""
    loss, throughput = metrics.loss, metrics.throughput
    return (
        f"loss {loss.total:.4f} (class {loss.class_:.4f}, mask {loss.mask:.4f}, dice {loss.dice:.4f})"
        f"  grad {metrics.grad_norm:.3g}  lr {metrics.lr:.3g}"
        f"  {throughput.images_per_s:.1f} images/s  data wait {100 * throughput.data_wait_share:.0f} %"
        f"{_traffic(metrics.storage)}{_memory(metrics.system)}  left {timedelta(seconds=round(throughput.eta_s))}"
    )


def _traffic(storage: StorageTraffic) -> str:
    """Return the data read since the last line; cache reads and retries are omitted if zero."""
    text = f"  read {storage.read_mb:.1f} MB"
    if storage.cached_mb:
        text += f" and {storage.cached_mb:.1f} MB cached"
    if storage.retries:
        text += f" with {storage.retries:.0f} retries"
    return text


def _memory(system: SystemUse) -> str:
    """Return the peak of allocated GPU memory, and the part of it per image of a micro-batch."""
    if system.gpu_memory_gb is None:
        return ""
    return f"  GPU {system.gpu_memory_gb:.1f} GB, {system.gpu_image_gb or 0.0:.2f} GB per image"
