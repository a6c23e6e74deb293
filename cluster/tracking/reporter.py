"""The reporter that MLflow hears."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from m2f.cluster.tracking.tracking import Tracking
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import metrics_on_their_way, newest_whole
from m2f.trainer.errors import CheckpointError
from m2f.trainer.reporting import CommittedCheckpoint, EventKind

LOGGER = logging.getLogger(__name__)


class TrackingReporter:
    """Metrics of training to MLflow, at their optimizer step."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._steps: set[int] = set()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Under `train/`, and under `system/` what MLflow shows as such.

        Steps that a restart does again are left out: they have the same values, or are those of a loss spike that was
        rolled back, which the curve keeps.
        """
        if step in self._steps:
            return
        self._steps.add(step)
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


def recover_metrics(reporter: TrackingReporter, storage: Storage, run_folder: str) -> None:
    """Track what was on its way when the newest checkpoint was saved: whoever carried it may have died since, and the
    steps up to this checkpoint are not done again."""
    newest = newest_whole(storage, run_folder)
    try:
        found = {} if newest is None else metrics_on_their_way(storage, newest.url)
    except CheckpointError as error:
        LOGGER.warning(f"tracking: a few points may be missing: {error}")
        return
    for step, values in found.items():
        reporter.metrics(step, values)


def _tracked_name(name: str) -> str:
    return name if name.startswith("system/") else f"train/{name}"
