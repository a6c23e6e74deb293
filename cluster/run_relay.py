"""What the driver does with news: lines for the person, points for MLflow."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.eval_manager import EvaluationProgress
from cluster.eval_queue import Entry
from cluster.eval_service import EvaluationClient
from cluster.progress import say
from cluster.reporters import TrackingReporter
from cluster.run_board import CheckpointReport, Delivery, EventReport
from cluster.tracking import RunStatus, TrackedRun, Tracking
from trainer.reporting import LogReporter, Reporters

PATIENCE_S = 10.0
HEADLINE = ("PQ", "AP", "mIoU")


class RunRelay:
    """Takes reports from the board and the evaluation manager; what does not answer now is asked again later."""

    def __init__(self, max_steps: int, board: Any, evaluations: EvaluationClient | None, tracked: TrackedRun) -> None:
        self._board = board
        self._evaluations = evaluations
        self._tracking = Tracking(tracked, "driver")
        self._reporter = Reporters(LogReporter(max_steps, sys.stdout), TrackingReporter(self._tracking))
        self._told = {entry.step for entry in evaluations.entries() if entry.settled} if evaluations else set()
        self._running: int | None = None
        self._received: Delivery | None = None
        self.last_event: EventReport | None = None
        """The last that the workers reported; the supervisor clears it before an attempt."""
        self.evaluations_idle = False
        """Whether every queued evaluation was settled when the manager last answered."""

    def update(self, stop: bool = False) -> bool:
        """Repeat what is new; returns whether the workers have said anything. `stop` asks them to end."""
        try:
            delivery = ray.get(self._board.take.remote(self._received, stop), timeout=PATIENCE_S)
        except RayError:  # it restarts by itself
            return False
        self._received = replace(delivery, reports=())
        for report in delivery.reports:
            report.tell(self._reporter)
            if isinstance(report, EventReport):
                self.last_event = report
            if isinstance(report, CheckpointReport) and self._evaluations is not None:
                self._evaluations.submit(report.checkpoint)
        if self._evaluations is not None:
            self._tell_evaluations(self._evaluations)
        return bool(delivery.reports)

    def close(self, status: RunStatus) -> None:
        """Send what waits and set the run's status."""
        self._tracking.finish(status)

    def _tell_evaluations(self, evaluations: EvaluationClient) -> None:
        status = evaluations.status()
        self.evaluations_idle = status is not None and status.idle
        if status is None:
            return
        if status.current is not None and status.current.step != self._running:
            self._running = status.current.step
            say(_started(status.current))
        for entry in status.entries:
            if entry.settled and entry.step not in self._told:
                self._told.add(entry.step)
                say(describe(entry))


def describe(entry: Entry) -> str:
    """One line on a settled evaluation."""
    if entry.status != "published":
        return f"step {entry.step}: evaluation {entry.status}: {entry.detail}"
    return f"step {entry.step}: evaluated: {headline(entry.metrics)}"


def headline(metrics: Mapping[str, float]) -> str:
    """The main numbers of every set: `val PQ 51.2, AP 30.1, mIoU 70.3`."""
    sets = sorted({name.rpartition("/")[0] for name in metrics})
    shown = {s: [f"{n} {metrics[f'{s}/{n}']:.2f}" for n in HEADLINE if f"{s}/{n}" in metrics] for s in sets}
    return "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in shown.items() if numbers)


def _started(progress: EvaluationProgress) -> str:
    return f"step {progress.step}: evaluating on {progress.dataset}, {progress.total} batches"
