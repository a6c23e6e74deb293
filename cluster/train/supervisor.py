"""The supervisor of a training run: Ray Train runs an attempt, this module decides what follows it.

An attempt is one `TorchTrainer.fit()` with `max_failures=0`, in a thread of its own. The main thread repeats what
workers and evaluations report, to the person and to MLflow, and listens for Ctrl-C.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from m2f.cluster.evaluation.evaluate import check_sets
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.evaluation.service import EvaluationClient
from m2f.cluster.ray_cluster import ClusterError, connect, this_node
from m2f.cluster.ray_private import attempt_config, scaling_config
from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.terminal import complain, format_duration, say
from m2f.cluster.tracking.tracking import RunStatus, TrackedRun, create_run
from m2f.cluster.train.compose import adjusted_job, begin_run, compose_job
from m2f.cluster.train.continuation import check_continuation
from m2f.cluster.train.elastic import Resize, Sizes
from m2f.cluster.train.failure_policy import Attempt, AttemptHistory, Failure, Retry, Stop, classify, decide, root_cause
from m2f.cluster.train.live_view import LiveView
from m2f.cluster.train.mailbox import EventReport, RunBoard
from m2f.cluster.train.relay import RunRelay
from m2f.cluster.train.worker import WorkerSettings, train_loop
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import UserError
from m2f.trainer.checkpoint.folder import delete_old, list_checkpoints, newest_step, newest_whole
from m2f.trainer.checkpoint.lease import Lease, hold_lease
from m2f.trainer.errors import LeaseLostError
from m2f.trainer.job import TrainJob
from m2f.trainer.recovery.adjustments import adjust, read_adjustments
from m2f.trainer.reporting import CommittedCheckpoint

POLL_S = 0.5
SILENCE_S = 60.0
ECHO_S = 1.0
"""Terminals and Ray send a signal to all processes of a job, and parents pass it on: another so soon is an echo."""
Status = Literal["finished", "stopped", "failed", "lost"]
_TRACKED_STATUS: dict[Status, RunStatus | None] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "lost": None,  # the status is for whoever has the lease now
}


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run_folder: str
    status: Status
    checkpoint: CommittedCheckpoint | None
    """The newest one."""
    failures: tuple[Failure, ...]
    """Why attempts ended early; the last one is the reason of a failed run."""
    resizes: tuple[Resize, ...]
    """Changes of the number of workers, and what each cost."""
    evaluations: tuple[Entry, ...]
    tracked: TrackedRun


def run_training(config: RunConfig, live: bool = False) -> RunSummary:
    """Train to `training.max_steps`, with restarts after failures and evaluations beside.

    A run folder that holds checkpoints is continued. Ctrl-C or SIGTERM end the run after one more checkpoint (status
    `stopped`). A finished run has waited for its evaluations; otherwise those that wait stay in the run folder and are
    done when the run is continued. `live` shows a panel on the terminal in place of a log.

    Raises:
        UserError: a mistake in the recipe, the data or the stored run, found here or by a worker.
        LeaseHeldError: another process trains in the run folder.
        LeaseLostError: another process took the run folder over, since this one gave no sign of life.
    """
    storage = Storage(config.storage)
    job = compose_job(config)
    check_continuation(job, storage)
    check_sets(config)
    may_grow = config.cluster.address is not None or "RAY_ADDRESS" in os.environ
    with (
        hold_lease(storage, config.run_folder, complain) as lease,
        connect(config),
        tempfile.TemporaryDirectory(prefix="m2f-ray-train-") as scratch,
    ):
        check_gpus(config, ray.cluster_resources().get("GPU", 0), may_grow)
        job = begin_run(config, job, lease.number, storage)
        view = LiveView(config.name, config.training.max_steps) if live else None
        return _Supervisor(config, job, storage, scratch, view, lease).run()


def check_gpus(config: RunConfig, available: float, may_grow: bool) -> None:
    """Raise ClusterError where a local cluster has too few GPUs: Ray would wait for them for ever, without a word.

    A cluster that was there before the run may grow, so there it is only said.
    """
    cluster, evaluation = config.cluster, config.evaluation
    training = cluster.min_workers * cluster.num_gpus_per_worker
    evaluating = evaluation.actors * evaluation.num_gpus_per_actor if evaluation.sets else 0
    if training + evaluating <= available:
        return
    message = (
        f"the run asks for {training:g} GPUs to train and {evaluating:g} to evaluate, and the cluster has "
        f"{available:g}; lower cluster.num_workers, cluster.num_gpus_per_worker, evaluation.actors or "
        "evaluation.num_gpus_per_actor"
    )
    if not may_grow:
        raise ClusterError(message)
    complain(f"waiting for the cluster to grow: {message}")


class _Supervisor:
    """One call of `run_training`, between the start of Ray and its end."""

    def __init__(
        self, config: RunConfig, job: TrainJob, storage: Storage, scratch: str, view: LiveView | None, lease: Lease
    ) -> None:
        self._config, self._job, self._storage, self._scratch, self._lease = config, job, storage, scratch, lease
        self._adjustments = read_adjustments(storage, config.run_folder)
        self._tracked = create_run(config, lease.number)
        self._evaluations: EvaluationClient | None = None
        if config.evaluation.sets:
            self._evaluations = EvaluationClient(config, self._tracked)
        self._board = _make_board()
        self._relay = RunRelay(config.training.max_steps, self._board, self._evaluations, self._tracked, view)
        self._sizes = Sizes(config.cluster)
        self._failures: list[Failure] = []
        self._interrupts = 0

    def run(self) -> RunSummary:
        """All attempts, then the evaluations that still wait."""
        status: Status = "failed"
        try:
            with self._listening(), self._sizes.asked_for():
                status = self._train()
                if status == "finished":
                    self._await_evaluations()
            self._lease.check()
        except KeyboardInterrupt:
            status = "stopped"
            raise
        except LeaseLostError:
            status = "lost"
            raise
        finally:
            try:
                entries = self._evaluations.close() if self._evaluations is not None else ()
            finally:
                self._relay.close(_TRACKED_STATUS[status])
        newest, keep = self._newest(), self._config.training.checkpoint.keep
        if newest is not None:  # evaluations have let go of checkpoints since the last commit
            delete_old(self._storage, self._config.run_folder, newest.step, keep, self._lease.number)
        waiting = sum(not entry.settled for entry in entries)
        if waiting:
            say(f"{waiting} evaluations wait; they are done when the run is continued")
        return RunSummary(
            run_folder=self._config.run_folder,
            status=status,
            checkpoint=newest,
            failures=tuple(self._failures),
            resizes=tuple(self._sizes.resizes),
            evaluations=entries,
            tracked=self._tracked,
        )

    def _train(self) -> Status:
        """Attempts until the run is done, stopped or hopeless."""
        self._relay.recover(self._storage, self._config.run_folder)
        history, number = AttemptHistory(self._newest_step()), 0
        while self._newest_step() < self._config.training.max_steps:
            workers = self._wait_for_room()
            if workers is None:
                return "stopped"
            number += 1
            error = self._attempt(number, workers)
            self._lease.check()
            step = self._newest_step()
            if error is None and step >= self._config.training.max_steps:
                break
            if error is None and self._interrupts:
                return "stopped"
            if error is None and self._sizes.growing:
                continue
            failure = failure_of(error, self._relay.last_event)
            self._failures.append(failure)
            history = history.after(Attempt(failure, step))
            decision = decide(history, self._config.cluster.max_failures)
            self._announce(failure, step, decision, error, number)
            if isinstance(decision, Stop):
                return self._give_up(error, failure)
            if decision.change is not None:
                self._lease.check()
                reason = f"{_first_line(failure.message)}: {decision.reason}"
                self._adjustments = adjust(self._storage, self._config.run_folder, decision.change, reason)
            self._pause(decision.delay_s)
            if self._interrupts:
                return "stopped"
        return "finished"

    def _attempt(self, number: int, workers: int) -> BaseException | None:
        """Run one worker group to its end; the error that ended it. Where the cluster has room for more it is ended."""
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                self._trainer(number, workers).fit()
            except BaseException as error:
                outcome.append(error)

        self._relay.begin_attempt(workers)
        thread = threading.Thread(target=fit, name=f"attempt-{number}", daemon=True)
        thread.start()
        silence = _Silence(self._config)
        while thread.is_alive():
            thread.join(POLL_S)
            silence.note(self._update())
            self._sizes.look(self._relay)
        self._update()
        self._relay.recover(self._storage, self._config.run_folder)
        self._sizes.ended(self._relay)
        self._submit_committed()
        return outcome[0] if outcome else None

    def _trainer(self, number: int, workers: int) -> TorchTrainer:
        cluster = self._config.cluster
        settings = WorkerSettings(adjusted_job(self._config, self._job, self._adjustments), self._board)
        automatic = "nccl" if cluster.num_gpus_per_worker else "gloo"
        return TorchTrainer(
            train_loop,
            train_loop_config={"settings": settings},
            torch_config=TorchConfig(
                backend=automatic if cluster.backend == "auto" else cluster.backend,
                timeout_s=round(self._config.training.collective_timeout_s),
            ),
            scaling_config=scaling_config(workers, cluster.num_gpus_per_worker > 0, cluster.needs),
            # a new name each: Ray would look for checkpoints of the last
            run_config=attempt_config(f"attempt-{number}", self._scratch, controller_failures(cluster)),
        )

    def _announce(
        self, failure: Failure, step: int, decision: Retry | Stop, error: BaseException | None, number: int
    ) -> None:
        """Say what happened in one line; the whole story goes to a file."""
        where = "" if failure.rank is None else f" on rank {failure.rank}"
        complain(f"attempt {number} ended at checkpoint step {step}{where}: {_first_line(failure.message)}")
        if error is not None:
            story = join(self._config.run_folder, "failures", f"{time.strftime('%Y%m%d-%H%M%S')}.txt")
            self._storage.put(story, f"{type(error).__name__}: {error}\n".encode())
            complain(f"  details: {story}")
        match decision:
            case Retry(delay_s, reason):
                complain(f"  starting again in {delay_s:.0f} s: {reason}")
            case Stop(reason):
                complain(f"  giving up: {reason}")

    def _give_up(self, error: BaseException | None, failure: Failure) -> Status:
        """A failed run; raises the user's own mistake where that is the reason."""
        errors = getattr(error, "worker_failures", {})
        cause = errors.get(failure.rank, error)
        if isinstance(cause, UserError):
            raise cause
        return "failed"

    def _wait_for_room(self) -> int | None:
        """Number of workers of the next attempt; None where the person does not want to wait any more."""
        silence = _Silence(self._config)
        while (workers := self._sizes.next()) is None:
            self._pause(POLL_S)
            silence.note(False)
            if self._interrupts:
                return None
        return workers

    def _pause(self, seconds: float) -> None:
        """Wait, unless the person does not want to."""
        deadline = time.monotonic() + seconds
        while not self._interrupts and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._update()

    def _await_evaluations(self) -> None:
        """Until every queued evaluation is settled, or the person has had enough."""
        if self._evaluations is None:
            return
        self._submit_committed()
        while not self._interrupts and not self._relay.evaluations_idle:
            if self._evaluations.lost is not None:
                complain(f"no evaluation: their manager cannot start ({self._evaluations.lost})")
                return
            time.sleep(POLL_S)
            self._update()

    def _update(self) -> bool:
        self._lease.raise_if_lost()
        return self._relay.update(stop=self._interrupts > 0 or self._sizes.growing)

    def _submit_committed(self) -> None:
        """A worker may have died between a commit and its report; queueing a step twice is harmless."""
        if self._evaluations is not None:
            for checkpoint in list_checkpoints(self._storage, self._config.run_folder):
                self._evaluations.submit(checkpoint)

    def _newest(self) -> CommittedCheckpoint | None:
        return newest_whole(self._storage, self._config.run_folder)

    def _newest_step(self) -> int:
        return newest_step(self._storage, self._config.run_folder)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: stop after a checkpoint. Second: KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        heard_at = -math.inf

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal heard_at
            if time.monotonic() - heard_at < ECHO_S:
                return
            heard_at = time.monotonic()
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            complain("stopping after a checkpoint; once more to end at once")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Silence:
    """Says so while the workers of an attempt have not reported anything yet, once a minute."""

    def __init__(self, config: RunConfig) -> None:
        self._cluster = config.cluster
        self._hint = "; training.compile makes the first step take minutes" if config.training.compile else ""
        self._since = self._said = time.monotonic()
        self._broken = False

    def note(self, heard: bool) -> None:
        """Called at every look; `heard` says whether there was a report."""
        self._broken = self._broken or heard
        now = time.monotonic()
        if self._broken or now - self._said < SILENCE_S:
            return
        self._said = now
        free, workers = ray.available_resources(), self._cluster
        complain(
            f"no word from the workers for {format_duration(now - self._since)}; one that waits for room "
            f"needs {workers.num_cpus_per_worker:g} CPUs and {workers.num_gpus_per_worker:g} GPUs, and the cluster has "
            f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} free now{self._hint}"
        )


def _make_board() -> Any:
    """On the driver's node: it shall not go with a node that workers lose."""
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=this_node())(RunBoard)
    return board.remote()


def controller_failures(cluster: ClusterConfig) -> int:
    """Ray may retry nothing, since it would at the same size; only a run of a fixed size may wait in it for room."""
    return 0 if cluster.min_workers < cluster.max_workers else -1


def failure_of(error: BaseException | None, last_event: EventReport | None) -> Failure:
    """Why an attempt ended before the last step; `error` is what Ray Train raised, None where the workers returned."""
    if last_event is not None and last_event.kind == "stalled":
        return Failure(None, "death", last_event.message)  # the error only says that processes are gone
    if error is None:
        if last_event is not None and last_event.kind == "drained":
            return Failure(None, "preemption", "the workers' machine was taken back")
        return Failure(None, "error", "the workers returned before the last step")
    if isinstance(error, ray.train.WorkerGroupError):
        return root_cause(error.worker_failures)
    error = getattr(error, "controller_failure", error)
    return Failure(None, classify(error), f"{type(error).__name__}: {error}")


def _first_line(message: str) -> str:
    return next((line for line in message.splitlines() if line.strip()), "unknown")[:300]
