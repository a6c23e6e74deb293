"""Driver side of events and evaluations: prints them and forwards them to MLflow."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from m2f.cluster.evaluation.lines import describe, describe_start
from m2f.cluster.evaluation.manager import EvaluationStatus
from m2f.cluster.evaluation.publication import evaluated_checkpoint, read_set_metrics
from m2f.cluster.evaluation.queue import Entry, evaluation_folder
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_out
from m2f.cluster.tracking.logged_models import KeptCheckpoints
from m2f.cluster.tracking.reporter import TrackingReporter
from m2f.cluster.tracking.tracking import RunStatus, TrackedRun, Tracking
from m2f.cluster.train.live_view import LiveView
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.format_count import format_count
from m2f.trainer.checkpoint.commits import read_metrics
from m2f.trainer.reporting import Event, LogReporter, Notice, Reporters, StepReport


class RunRelay:
    """Reporter of the driver. It also records the progress of the current attempt."""

    def __init__(
        self, max_steps: int, tracked: TrackedRun, settled: tuple[Entry, ...], view: LiveView | None = None
    ) -> None:
        """`settled` evaluations are not printed again. If a `view` is given, it is started and replaces log lines."""
        self._tracking = Tracking(tracked, "driver")
        self._view = view
        self._tracking_reporter = TrackingReporter(self._tracking)
        self._reporter = Reporters(view or LogReporter(max_steps, sys.stdout), self._tracking_reporter)
        self._shown_keys = {entry.key for entry in settled}
        self._announced_key: str | None = None
        self._read_urls: set[str] = set()
        self.resumed: Notice | None = None
        """The `resumed` notice of this attempt; None until it arrives."""
        self.last_step = 0
        """Last step that rank 0 has reported."""
        if view is not None:
            for entry in settled:
                view.add_evaluation(entry)
            view.start()

    def begin_attempt(self, workers: int) -> None:
        """Show that workers are starting."""
        self.resumed = None
        if self._view is None:
            print_out(f"starting {format_count(workers, 'training worker')}")
        else:
            self._view.begin_attempt(workers)

    def report(self, event: Event) -> None:
        """Show an event of rank 0 and forward it to MLflow."""
        self._reporter.report(event)
        match event:
            case StepReport(step):
                self.last_step = step
            case Notice(kind="resumed"):
                self.resumed = event

    def track_stored(self, storage: Storage, run_folder: str) -> None:
        """Log the points in `metrics/` of the run folder to MLflow, in case a process died before it logged them."""
        for url, points in read_metrics(storage, run_folder, self._read_urls):
            accepted = [self._tracking_reporter.track(step, values) for step, values in points.items()]
            if all(accepted):  # otherwise the disk is full, and the file is read again at the end
                self._read_urls.add(url)

    def track_evaluations(self, config: RunConfig, storage: Storage, entries: Iterable[Entry]) -> None:
        """Log the results of published evaluations to a store that does not have them."""
        for entry in entries:
            if entry.status == "published":
                checkpoint = evaluated_checkpoint(config, storage, entry.checkpoint, entry.step, entry.commit)
                self._tracking.log_evaluation(checkpoint, read_set_metrics(config, storage, entry))
                self._tracking.log_metrics(entry.step, entry.metrics)  # including those of sets with damaged files
                folder = evaluation_folder(entry.step)
                if "://" not in config.run_folder:
                    self._tracking.log_artifact(join(config.run_folder, folder), folder)

    def show_evaluations(self, status: EvaluationStatus) -> None:
        """Show the running evaluation, and each settled one once."""
        if self._view is not None:
            self._view.show_evaluation(status.current)
        elif status.current is not None and status.current.key != self._announced_key:
            self._announced_key = status.current.key
            print_out(describe_start(status.current))
        for entry in status.entries:
            if entry.settled and entry.key not in self._shown_keys:
                self._shown_keys.add(entry.key)
                print_out(describe(entry))
                if self._view is not None:
                    self._view.add_evaluation(entry)

    def show_interrupted(self) -> None:
        """Show in the panel that the user has asked the run to stop."""
        if self._view is not None:
            self._view.show_interrupted()

    def close(self, status: RunStatus | None, kept: KeptCheckpoints | None = None) -> None:
        """Send pending entries and set the status of the MLflow run.

        If `status` is None, another process has taken over the run, and nothing is sent. `kept` holds the remaining
        checkpoints; None if they are unknown, or if the run does not evaluate.
        """
        if self._view is not None:
            self._view.stop((status or "lost").lower().replace("killed", "stopped"))
        if status is None:
            self._tracking.abandon()
        else:
            self._tracking.finish(status, kept=kept)
