"""The reporter that MLflow hears."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.tracking import Tracking
from trainer.reporting import CommittedCheckpoint, EventKind


class TrackingReporter:
    """Metrics of training to MLflow, at their optimizer step."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._last_step = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Under `train/`, and under `system/` what MLflow shows as such.

        Steps that a restart does again are left out: they have the same values.
        """
        if step <= self._last_step:
            return
        self._last_step = step
        self._tracking.log_metrics(step, {_tracked_name(name): value for name, value in values.items()})

    def rank_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: `metrics` has what matters of all ranks."""

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """The newest one, as tags."""
        self._tracking.set_tag("checkpoint.step", str(checkpoint.step))
        self._tracking.set_tag("checkpoint.url", checkpoint.url)

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """The last of its kind, as a tag."""
        self._tracking.set_tag(f"event.{kind}", f"step {step}: {message}")


def _tracked_name(name: str) -> str:
    return name if name.startswith("system/") else f"train/{name}"
