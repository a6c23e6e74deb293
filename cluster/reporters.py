"""Reporters that MLflow and several listeners hear."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.tracking import Tracking
from trainer.reporting import CommittedCheckpoint, EventKind, Reporter


class TrackingReporter:
    """Metrics of training to MLflow, at their optimizer step."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._last_step = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Under `train/`. Steps that a restart does again are left out: they have the same values."""
        if step <= self._last_step:
            return
        self._last_step = step
        self._tracking.log_metrics(step, {f"train/{name}": value for name, value in values.items()})

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """The newest one, as tags."""
        self._tracking.set_tag("checkpoint.step", str(checkpoint.step))
        self._tracking.set_tag("checkpoint.url", checkpoint.url)

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """The last of its kind, as a tag."""
        self._tracking.set_tag(f"event.{kind}", f"step {step}: {message}")


class Reporters:
    """One reporter that repeats everything to several."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.metrics(step, values)

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.checkpoint(checkpoint)

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """To all."""
        for reporter in self._reporters:
            reporter.event(kind, step, message)
