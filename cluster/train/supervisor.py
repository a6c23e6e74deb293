"""The supervisor of a training run: a launcher runs the ranks of an attempt, and this module decides what follows.

It forwards the reports of ranks and evaluations to the user and to MLflow, and handles Ctrl-C. This module does not
need Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from m2f.cluster.evaluation.early_stopping import EarlyStop, early_stop, unknown_metrics
from m2f.cluster.evaluation.evaluate import check_sets
from m2f.cluster.evaluation.publication import kept_checkpoints
from m2f.cluster.evaluation.queue import Entry, queue_url, read_entries
from m2f.cluster.evaluation.rebuild import restore_queue
from m2f.cluster.evaluation.service import poll_interval_s
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.pinned_weights import with_pinned_weights
from m2f.cluster.start.continuation import check_continuation
from m2f.cluster.start.epochs import with_steps
from m2f.cluster.terminal import first_line, format_duration, print_err, print_out
from m2f.cluster.tracking.logged_models import KeptCheckpoints
from m2f.cluster.tracking.record import record_evaluations
from m2f.cluster.tracking.tracking import RunStatus, TrackedRun, create_run
from m2f.cluster.train.compose import adjusted_job, begin_run, compose_job
from m2f.cluster.train.elastic import Resize, WorkerScaler
from m2f.cluster.train.failure_policy import (
    Attempt,
    AttemptError,
    AttemptHistory,
    Failure,
    Retry,
    Stop,
    classify_attempt,
    decide,
)
from m2f.cluster.train.launcher import Launcher
from m2f.cluster.train.live_view import LiveView
from m2f.cluster.train.relay import RunRelay
from m2f.cluster.train.signals import handling_signals
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.model.format_count import format_count
from m2f.trainer.checkpoint.commits import list_commits, repair_commits
from m2f.trainer.checkpoint.folder import delete_old, newest_step, newest_undamaged
from m2f.trainer.checkpoint.lease import LEASE_VARIABLE, Lease, hold_lease
from m2f.trainer.errors import LeaseLostError
from m2f.trainer.job import TrainJob
from m2f.trainer.recovery.adjustments import adjust, read_adjustments
from m2f.trainer.recovery.ending import Ending, read_ending
from m2f.trainer.reporting import CommittedCheckpoint, Notice

LOGGER = logging.getLogger(__name__)
POLL_S = 0.5
"""Pause in seconds between two polls of the launcher and of the evaluations, and longest delay of a signal."""
SILENCE_WARNING_S = 60.0
"""Seconds between two messages that no worker has reported. Workers usually start in less."""
Status = Literal["finished", "stopped", "drained", "failed", "lost"]
_TRACKED_STATUS: dict[Status, RunStatus | None] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "drained": "KILLED",
    "failed": "FAILED",
    "lost": None,  # the new holder of the lease sets the status
}


@dataclass(frozen=True)
class RunSummary:
    """Outcome of a supervised run."""

    run_folder: str
    status: Status
    checkpoint: CommittedCheckpoint | None
    """The newest checkpoint; None if there is none."""
    failures: tuple[Failure, ...]
    """Reasons why attempts ended early. If the run failed, the last entry is the reason."""
    resizes: tuple[Resize, ...]
    """Changes in the number of workers, with their cost."""
    evaluations: tuple[Entry, ...]
    tracked: TrackedRun


def run_supervised(config: RunConfig, launcher: Launcher, live: bool = False) -> RunSummary:
    """Train to the last step, or until early stopping ends the run, with restarts after failures; return a summary.

    `run_training` and `train_locally` call this function with their launchers, and list its errors.
    """
    # With `m2f train --restart`, the parent process holds the lease, so the storage has already answered.
    storage = Storage(config.storage, known_reachable=LEASE_VARIABLE in os.environ, on_wait=print_err)
    config = with_pinned_weights(with_steps(config, storage), storage)
    job = compose_job(config, storage)
    check_continuation(job, storage)
    check_sets(config)
    with hold_lease(storage, config.run_folder, print_err) as lease, launcher:
        job = begin_run(config, job, lease.number, storage)
        view = LiveView(config.name, config.training.max_steps) if live else None
        return _Supervisor(config, job, storage, launcher, view, lease).run()


class _Supervisor:
    """State of one supervised run, while the launcher is entered."""

    def __init__(
        self,
        config: RunConfig,
        job: TrainJob,
        storage: Storage,
        launcher: Launcher,
        view: LiveView | None,
        lease: Lease,
    ) -> None:
        self._config, self._job, self._storage, self._launcher, self._lease = config, job, storage, launcher, lease
        self._adjustments = read_adjustments(storage, config.run_folder)
        self._tracked = create_run(config, lease.number)
        self._repair_commits()  # before anything reads the stored evaluations: the user may have gone back
        if config.evaluation.sets and (restored := restore_queue(config, storage)) is not None:
            print_err(restored)
        self._evaluations = launcher.evaluations(self._tracked) if config.evaluation.sets else None
        stored_entries = self._stored_entries()
        settled = [entry for entry in stored_entries if entry.settled]
        self._relay = RunRelay(config.training.max_steps, self._tracked, tuple(settled), view)
        if self._tracked.recreated:
            self._relay.track_evaluations(config, storage, settled)
            record_evaluations(storage, config.run_folder)
        self._scaler = WorkerScaler(config.cluster, launcher.free_nodes)
        self._failures: list[Failure] = []
        self._interrupts = 0
        self._early_stop: EarlyStop | None = None
        self._metric_warned = False
        self._stop_reported = False
        self._check_metrics(stored_entries)

    def run(self) -> RunSummary:
        """Run all attempts; if the run finishes, wait for pending evaluations. Return a summary."""
        status: Status = "failed"
        ended = False
        try:
            with handling_signals(self._interrupt):
                self._relay.track_stored(self._storage, self._config.run_folder)
                status = self._train()
                if status == "finished":
                    status = self._await_evaluations()
            self._lease.check()
            self._relay.track_stored(self._storage, self._config.run_folder)
            ended = True
        except KeyboardInterrupt:
            status = "stopped"
            raise
        except LeaseLostError:
            status = "lost"
            raise
        finally:
            kept_checkpoints = None
            try:
                if self._evaluations is not None:
                    self._evaluations.close()
                entries = self._stored_entries()
                kept_checkpoints = self._delete_old() if ended else None
            except LeaseLostError:
                status = "lost"
                raise
            finally:
                self._relay.close(_TRACKED_STATUS[status], kept_checkpoints)
        waiting = sum(not entry.settled for entry in entries)
        if waiting:
            print_out(f"{format_count(waiting, 'evaluation')} pending until the run is continued")
        return RunSummary(
            run_folder=self._config.run_folder,
            status=status,
            checkpoint=self._newest(),
            failures=tuple(self._failures),
            resizes=tuple(self._scaler.resizes),
            evaluations=entries,
            tracked=self._tracked,
        )

    def _delete_old(self) -> KeptCheckpoints | None:
        """Delete checkpoints that evaluations have unpinned since the last commit.

        Returns the remaining checkpoints if the run evaluates, otherwise None.
        """
        newest, run_folder = self._newest(), self._config.run_folder
        if newest is not None:
            keep = self._config.training.checkpoint.keep
            delete_old(self._storage, run_folder, newest.step, keep, self._lease.number)
        return kept_checkpoints(self._storage, run_folder) if self._evaluations is not None else None

    def _train(self) -> Status:
        """Run attempts until the run finishes, is stopped, or the failure policy gives up."""
        history, number = AttemptHistory(self._newest_step()), 0
        while not self._is_trained():
            workers = self._wait_for_resources()
            if workers is None:
                break
            number += 1
            error, ending = self._attempt(number, workers)
            self._lease.check()
            step = self._newest_step()
            if self._is_trained():
                break  # the last step is committed, so errors of the ranks after it do not matter
            if error is None and self._interrupts:
                return "stopped"
            if error is None and self._scaler.growing:
                continue
            failure = classify_attempt(error, ending)
            if self._interrupts and failure.kind in ("death", "resources"):
                return "stopped"  # the signal came before a rank could handle it
            if failure.kind == "resources":  # this is not a failure; it is retried after each timeout of Ray
                print_err(f"waiting for free resources: {self._launcher.describe_wait()}")
                continue
            self._failures.append(failure)
            history = history.after(Attempt(failure, step))
            decision = decide(history, self._config.cluster.max_failures)
            self._announce(failure, step, decision, error, number)
            if isinstance(decision, Stop):
                return self._give_up(error, failure)
            if failure.kind == "preemption" and self._launcher.is_draining:
                return "drained"
            if decision.change is not None:
                self._lease.check()
                reason = f"{first_line(failure.message)}: {decision.reason}"
                self._adjustments = adjust(self._storage, self._config.run_folder, decision.change, reason)
            self._pause(decision.delay_s)
            if self._interrupts:
                break
        return "finished" if self._is_trained() else "stopped"

    def _is_trained(self) -> bool:
        """Return whether all steps are done or early stopping has ended the run."""
        return self._early_stop is not None or self._newest_step() >= self._config.training.max_steps

    def _attempt(self, number: int, workers: int) -> tuple[AttemptError | None, Ending | None]:
        """Run one attempt; return the errors of its ranks and the record that a rank left. Each is None if missing.

        If there is room for more workers, the ranks are asked to end after a checkpoint.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
        job = replace(adjusted_job(self._config, self._job, self._adjustments), attempt=name)
        self._relay.begin_attempt(workers)
        silence = _SilenceWarning(self._config, self._launcher)
        self._launcher.start(job, workers)
        while self._launcher.running:
            silence.update(self._update(POLL_S))
            self._scaler.check_growth(self._relay)
        self._update(0.0)
        self._scaler.record_end(self._relay)
        self._repair_commits()
        return self._launcher.attempt_error(), read_ending(self._storage, self._config.run_folder, name)

    def _announce(
        self, failure: Failure, step: int, decision: Retry | Stop, error: AttemptError | None, number: int
    ) -> None:
        """Print the failure and the decision, and write the details to a file in `failures/`."""
        where = "" if failure.rank is None else f" on rank {failure.rank}"
        print_err(f"attempt {number} ended{where} after checkpoint step {step}: {first_line(failure.message)}")
        if error is not None:
            url = join(self._config.run_folder, "failures", f"{time.strftime('%Y%m%d-%H%M%S')}-{number}.txt")
            self._storage.put(url, error.details.encode())
            print_err(f"  details: {url}")
        match decision:
            case Retry(delay_s, reason):
                print_err(f"  restarting in {delay_s:.0f} s: {reason}")
            case Stop(reason):
                print_err(f"  giving up: {reason}")

    def _give_up(self, error: AttemptError | None, failure: Failure) -> Status:
        """Return "failed", or raise the error if it is a UserError."""
        cause = None if error is None else error.other if failure.rank is None else error.by_rank[failure.rank]
        if isinstance(cause, UserError):
            raise cause
        return "failed"

    def _wait_for_resources(self) -> int | None:
        """Wait for resources and return the number of workers for the next attempt; None if the run must end."""
        silence = _SilenceWarning(self._config, self._launcher)
        while (workers := self._scaler.next()) is None:
            self._pause(POLL_S)
            silence.update(False)
            if self._interrupts or self._early_stop is not None:
                return None
        return workers

    def _pause(self, seconds: float) -> None:
        """Wait, but return at once if the user interrupts."""
        deadline = time.monotonic() + seconds
        while not self._interrupts and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._update(0.0)

    def _await_evaluations(self) -> Status:
        """Wait until the evaluations of all commits are settled or have stopped, or the user interrupts.

        Returns "stopped" if the user interrupted while evaluations were pending, otherwise "finished".
        """
        if self._evaluations is None:
            return "finished"
        self._evaluations.training_ended()
        while not (are_settled := self._are_commits_settled()) and not self._interrupts:
            if self._evaluations.failure_reason is not None:
                break
            self._pause(poll_interval_s(self._config.run_folder))
        self._update(0.0)
        return "stopped" if self._interrupts and not are_settled else "finished"

    def _are_commits_settled(self) -> bool:
        try:
            settled = {entry.commit for entry in self._stored_entries() if entry.settled}
            return {commit.name for commit in list_commits(self._storage, self._config.run_folder)} <= settled
        except StorageError as error:  # training is done, so it does no harm to wait for the storage
            LOGGER.warning("evaluations are waiting for the storage: %s", error)
            return False

    def _update(self, wait_s: float) -> bool:
        """Wait up to `wait_s` seconds and forward new events; return whether a rank has reported anything."""
        self._lease.raise_if_lost()
        is_ending = self._interrupts > 0 or self._early_stop is not None
        events = self._launcher.poll(is_ending or self._scaler.growing, wait_s)
        for event in events:
            self._relay.report(event)
        if self._evaluations is not None and (status := self._evaluations.status()) is not None:
            self._relay.show_evaluations(status)
            self._check_metrics(status.entries)
        self._report_stopped_evaluations()
        return bool(events)

    def _report_stopped_evaluations(self) -> None:
        """Print once why evaluations have stopped. Training continues, because a resumed run evaluates its commits."""
        reason = None if self._evaluations is None else self._evaluations.failure_reason
        if reason is not None and not self._stop_reported:
            self._stop_reported = True
            print_err(f"evaluations stopped: {reason}. Start the run again to evaluate the remaining checkpoints")

    def _check_metrics(self, entries: Sequence[Entry]) -> None:
        """End the run if the results meet the early-stopping criterion; report this, and metrics without results."""
        if not self._metric_warned and (problems := unknown_metrics(self._config.training, entries)):
            self._metric_warned = True
            print_err("\n".join(problems))
        settings = self._config.training.early_stopping
        if settings is None or self._early_stop is not None:
            return
        self._early_stop = early_stop(settings, entries)
        if self._early_stop is not None:
            self._relay.report(Notice("early_stop", self._early_stop.step, self._early_stop.reason))

    def _repair_commits(self) -> None:
        self._lease.check()
        repair_commits(self._storage, self._config.run_folder, self._job.evaluates)

    def _stored_entries(self) -> tuple[Entry, ...]:
        """Return the entries of the evaluation queue; none if the run does not evaluate."""
        return () if self._evaluations is None else read_entries(self._storage, queue_url(self._config))

    def _newest(self) -> CommittedCheckpoint | None:
        return newest_undamaged(self._storage, self._config.run_folder)

    def _newest_step(self) -> int:
        return newest_step(self._storage, self._config.run_folder)

    def _interrupt(self, number: signal.Signals) -> None:
        """Stop after a checkpoint at the first SIGINT or SIGTERM; raise KeyboardInterrupt at the second."""
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        print_err("stopping after a checkpoint; press Ctrl-C again to stop immediately")
        self._relay.show_interrupted()


class _SilenceWarning:
    """Prints a message once a minute until a worker has reported something."""

    def __init__(self, config: RunConfig, launcher: Launcher) -> None:
        self._launcher = launcher
        self._hint = "; with training.compile, the first step takes minutes" if config.training.settled_compile else ""
        self._started_at = self._warned_at = time.monotonic()
        self._has_report = False

    def update(self, has_report: bool) -> None:
        """Print the message if it is due. Call this at every poll; `has_report` states whether a report has arrived."""
        self._has_report = self._has_report or has_report
        now = time.monotonic()
        if self._has_report or now - self._warned_at < SILENCE_WARNING_S:
            return
        self._warned_at = now
        reason = self._launcher.describe_wait()
        print_err(
            f"no report from the workers for {format_duration(now - self._started_at)}"
            f"{f'; {reason}' if reason else ''}{self._hint}"
        )
