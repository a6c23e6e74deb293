"""Where metrics, checkpoints and events of a run go."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, TextIO

EventKind = Literal[
    "weights",
    "resumed",
    "damaged",
    "data",
    "substituted",
    "skipped",
    "spike",
    "memory",
    "slow",
    "stalled",
    "drained",
    "stopped",
    "finished",
]

STALL_EXIT = 75
"""Status of a rank that ended itself after the event `stalled`."""


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


class Reporter(Protocol):
    """Told by the loop; must return at once and never raise for an outage of what is behind it."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 only, every `log_every_steps` optimizer steps."""
        ...

    def rank_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """On every rank, as often as `metrics`: what it measured of itself (see RankNumbers)."""
        ...

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """On every rank, in the same step, after the commit."""
        ...

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """Rank 0 (`stalled`: any): something worth a line in the log."""
        ...


class Reporters:
    """One reporter that repeats everything to several."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.metrics(step, values)

    def rank_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.rank_metrics(step, values)

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.checkpoint(checkpoint)

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.event(kind, step, message)


class LogReporter:
    """One readable line per report."""

    def __init__(self, max_steps: int, stream: TextIO | None = None) -> None:
        self.max_steps = max_steps
        self.stream = stream or sys.stdout

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Step, losses, gradient norm, learning rate, images/s, time waited for data, traffic, memory, time left."""
        left = timedelta(seconds=round(values["eta_s"]))
        self._line(
            f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"
            f"  loss {values['loss/total']:.4f} (class {values['loss/class']:.4f}, mask {values['loss/mask']:.4f}, "
            f"dice {values['loss/dice']:.4f})  grad {values['grad_norm']:.3g}  lr {values['lr']:.3g}"
            f"  {values['images_per_s']:.1f} images/s  data wait {100 * values['data_wait_share']:.0f} %"
            f"{_traffic(values)}{_memory(values)}  left {left}"
        )

    def rank_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: the line of `metrics` speaks for all ranks."""

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """Where the checkpoint is."""
        self._line(f"step {checkpoint.step}: checkpoint {checkpoint.url}")

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """The message."""
        self._line(f"step {step}: {kind}: {message}")

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _traffic(values: Mapping[str, float]) -> str:
    """What was read since the last line, in words that are left out where there is nothing to say."""
    words = f"  read {values['storage/read_mb']:.1f} MB"
    if values["storage/cached_mb"]:
        words += f" and {values['storage/cached_mb']:.1f} MB cached"
    if values["storage/retries"]:
        words += f" with {values['storage/retries']:.0f} retries"
    return words


def _memory(values: Mapping[str, float]) -> str:
    """The most that tensors took on a GPU, and of it what an image of a micro-batch took."""
    if "system/gpu_memory_gb" not in values:
        return ""
    return f"  GPU {values['system/gpu_memory_gb']:.1f} GB, {values['system/gpu_image_gb']:.2f} GB an image"
