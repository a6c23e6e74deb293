"""Reporter that forwards events to MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from m2f.cluster.tracking.tracking import Tracking
from m2f.trainer.reporting import CommitReport, Event, Notice, StepReport


class TrackingReporter:
    """Metrics at their optimizer step; the newest checkpoint and the last notice of each kind as tags."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._steps: set[int] = set()

    def report(self, event: Event) -> None:
        """Nothing for a RankReport: a StepReport has what matters of all ranks."""
        match event:
            case StepReport(step, metrics):
                self.track(step, metrics.values())
            case CommitReport(checkpoint):
                self._tracking.set_tag("checkpoint.step", str(checkpoint.step))
                self._tracking.set_tag("checkpoint.url", checkpoint.url)
            case Notice(kind, step, message):
                self._tracking.set_tag(f"event.{kind}", f"step {step}: {message}")

    def track(self, step: int, values: Mapping[str, float]) -> bool:
        """Values by name, under `train/`, and under `system/` what MLflow shows as such.

        Steps that a restart does again are left out: they have the same values, or are those of a loss spike that was
        rolled back, which the curve keeps. Returns False where the disk refuses the step: it may be tracked again.
        """
        if step in self._steps:
            return True
        taken = self._tracking.log_metrics(step, {tracked_name(name): value for name, value in values.items()})
        if taken:
            self._steps.add(step)
        return taken


def tracked_name(name: str) -> str:
    """How MLflow names a metric of training."""
    return name if name.startswith("system/") else f"train/{name}"
