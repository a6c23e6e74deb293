"""Reporter that forwards events to MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from m2f.cluster.tracking.tracking import Tracking
from m2f.trainer.reporting import CommitReport, Event, Notice, StepReport


class TrackingReporter:
    """Reporter that logs metrics by optimizer step, and the newest checkpoint and last notice of each kind as tags."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._steps: set[int] = set()

    def report(self, event: Event) -> None:
        """Log an event. RankReport is ignored, because StepReport summarizes all ranks."""
        match event:
            case StepReport(step, metrics):
                self.track(step, metrics.values())
            case CommitReport(checkpoint):
                self._tracking.set_tag("checkpoint.step", str(checkpoint.step))
                self._tracking.set_tag("checkpoint.url", checkpoint.url)
            case Notice(kind, step, message):
                self._tracking.set_tag(f"event.{kind}", f"step {step}: {message}")

    def track(self, step: int, values: Mapping[str, float]) -> bool:
        """Log values by name under `train/`; names under `system/`, which MLflow shows separately, stay unchanged.

        Steps that a restart repeats are not logged again. Their values are the same, unless a loss spike was rolled
        back; the curve then keeps the values of the spike. Returns False if the disk refuses the values; the step can
        then be tracked again.
        """
        if step in self._steps:
            return True
        accepted = self._tracking.log_metrics(step, {tracked_name(name): value for name, value in values.items()})
        if accepted:
            self._steps.add(step)
        return accepted


def tracked_name(name: str) -> str:
    """Return the MLflow name of a training metric."""
    return name if name.startswith("system/") else f"train/{name}"
