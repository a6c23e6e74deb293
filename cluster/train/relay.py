"""What the driver does with news: lines for the person, points for MLflow."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from m2f.cluster.evaluation.lines import describe, started
from m2f.cluster.evaluation.service import EvaluationClient
from m2f.cluster.terminal import say
from m2f.cluster.tracking.reporter import TrackingReporter, recover_metrics
from m2f.cluster.tracking.tracking import RunStatus, TrackedRun, Tracking
from m2f.cluster.train.live_view import LiveView
from m2f.cluster.train.mailbox import CheckpointReport, Delivery, EventReport, MetricsReport, Word
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.reporting import LogReporter, Reporters

PATIENCE_S = 10.0


class RunRelay:
    """Takes reports from the board and the evaluation manager; what does not answer now is asked again later."""

    def __init__(
        self,
        max_steps: int,
        board: Any,
        evaluations: EvaluationClient | None,
        tracked: TrackedRun,
        view: LiveView | None = None,
    ) -> None:
        """With a `view`, which is started here, the person sees a panel; without, a line per report."""
        self._board = board
        self._evaluations = evaluations
        self._tracking = Tracking(tracked, "driver")
        self._view = view
        self._tracking_reporter = TrackingReporter(self._tracking)
        self._reporter = Reporters(view or LogReporter(max_steps, sys.stdout), self._tracking_reporter)
        settled = [entry for entry in evaluations.entries() if entry.settled] if evaluations else []
        self._told = {entry.step for entry in settled}
        self._running: int | None = None
        self._received: Delivery | None = None
        self.last_event: EventReport | None = None
        """The last that the workers of this attempt reported."""
        self.resumed: EventReport | None = None
        """The event `resumed` of this attempt."""
        self.last_step = 0
        """The last step whose metrics the workers reported."""
        self.evaluations_idle = False
        """Whether every queued evaluation was settled when the manager last answered."""
        if view is not None:
            for entry in settled:
                view.evaluated(entry)
            view.start()

    def begin_attempt(self, workers: int) -> None:
        """Workers are being started."""
        self.last_event = self.resumed = None
        if self._view is None:
            say(f"starting {workers} training workers")
        else:
            self._view.begin_attempt(workers)

    def update(self, stop: bool = False) -> bool:
        """Repeat what is new; returns whether the workers have said anything. `stop` asks them to end."""
        try:
            word = Word(stop, self.last_step)
            delivery = ray.get(self._board.take.remote(self._received, word), timeout=PATIENCE_S)
        except RayError:  # it restarts by itself
            return False
        self._received = replace(delivery, reports=())
        for report in delivery.reports:
            report.tell(self._reporter)
            if isinstance(report, EventReport):
                self.last_event = report
                self.resumed = report if report.kind == "resumed" else self.resumed
            if isinstance(report, MetricsReport):
                self.last_step = report.step
            if isinstance(report, CheckpointReport) and self._evaluations is not None:
                self._evaluations.submit(report.checkpoint)
        if self._evaluations is not None:
            self._tell_evaluations(self._evaluations)
        return bool(delivery.reports)

    def recover(self, storage: Storage, run_folder: str) -> None:
        """Track metrics that only the newest checkpoint holds. Called while no workers run."""
        recover_metrics(self._tracking_reporter, storage, run_folder)

    def close(self, status: RunStatus | None) -> None:
        """Send what waits and set the run's status; None: another process has the run now, send nothing."""
        if self._view is not None:
            self._view.stop((status or "lost").lower().replace("killed", "stopped"))
        if status is None:
            self._tracking.abandon()
        else:
            self._tracking.finish(status)

    def _tell_evaluations(self, evaluations: EvaluationClient) -> None:
        status = evaluations.status()
        self.evaluations_idle = status is not None and status.idle
        if status is None:
            return
        if self._view is not None:
            self._view.evaluating(status.current)
        elif status.current is not None and status.current.step != self._running:
            self._running = status.current.step
            say(started(status.current))
        for entry in status.entries:
            if entry.settled and entry.step not in self._told:
                self._told.add(entry.step)
                say(describe(entry))
                if self._view is not None:
                    self._view.evaluated(entry)
