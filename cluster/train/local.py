"""`m2f train --launcher local`: the trainer's loop in plain processes, with a log, MLflow, and signals as control."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Literal

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import complain
from m2f.cluster.train.processes import launch
from m2f.trainer.errors import LeaseLostError, LossSpikeError, OutOfMemoryError
from m2f.trainer.job import TrainJob

if TYPE_CHECKING:
    from m2f.cluster.tracking.tracking import TrackedRun
    from m2f.trainer.checkpoint.lease import Lease


def train_locally(config: RunConfig, live: bool = False) -> Literal["finished", "stopped"]:
    """Train a recipe with `cluster.num_workers` processes (of a range: the most) on this machine.

    Checkpoints are not evaluated meanwhile. SIGINT or SIGTERM stop the run after a checkpoint. Where memory does not
    suffice or the loss spikes, the processes start again with what `decide` changes. `live` shows a panel on the
    terminal in place of a log.

    Raises:
        UserError: the recipe, the data or the store cannot be used.
        LeaseHeldError: another process trains in the run folder.
        LeaseLostError: another process took the run folder over, since this one gave no sign of life.
        LaunchError: a rank failed; the run goes on from its last checkpoint when it is started again.
    """
    from m2f.cluster.tracking.reporter import TrackingReporter, recover_metrics
    from m2f.cluster.tracking.tracking import Tracking, create_run
    from m2f.cluster.train.compose import begin_run, compose_job
    from m2f.cluster.train.continuation import check_continuation
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.checkpoint.folder import newest_whole
    from m2f.trainer.checkpoint.lease import hold_lease

    storage = Storage(config.storage)
    job = compose_job(config)
    check_continuation(job, storage)
    with hold_lease(storage, config.run_folder, complain) as lease:
        job = begin_run(config, job, lease.number, storage)
        run = create_run(config, lease.number)
        driver = Tracking(run, "driver")
        try:
            recover_metrics(TrackingReporter(driver), storage, config.run_folder)  # of a driver with Ray
            _attempts(config, job, run, lease, live)
            lease.check()
        except LeaseLostError:
            driver.abandon()
            raise
        except BaseException as error:
            driver.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", timeout_s=10.0)
            raise
        newest = newest_whole(storage, config.run_folder)
        finished = newest is not None and newest.step >= config.training.max_steps
        driver.finish("FINISHED" if finished else "KILLED")
    return "finished" if finished else "stopped"


def worker_environment(config: RunConfig) -> dict[str, str]:
    """What a rank's process must find in its environment before it imports torch and DeepSpeed."""
    environment = {"OMP_NUM_THREADS": str(config.training.threads)}
    if not config.cluster.num_gpus_per_worker:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _attempts(config: RunConfig, job: TrainJob, run: TrackedRun, lease: Lease, live: bool) -> None:
    from m2f.cluster.train.compose import adjusted_job
    from m2f.cluster.train.failure_policy import Attempt, AttemptHistory, Retry, decide, root_cause
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.checkpoint.folder import newest_step
    from m2f.trainer.recovery.adjustments import adjust, read_adjustments

    storage, folder, environment = Storage(config.storage), config.run_folder, worker_environment(config)
    adjustments = read_adjustments(storage, folder)
    history = AttemptHistory(newest_step(storage, folder))
    while True:
        try:
            arguments = (adjusted_job(config, job, adjustments), run, live)
            return launch(train_rank, arguments, config.cluster.max_workers, environment, lease.raise_if_lost)
        except (OutOfMemoryError, LossSpikeError) as error:
            history = history.after(Attempt(root_cause({0: error}), newest_step(storage, folder)))
            decision = decide(history, config.cluster.max_failures)
            if not isinstance(decision, Retry) or decision.change is None:
                raise
            complain(f"{error}\n  starting again {decision.reason}")
            lease.check()
            adjustments = adjust(storage, folder, decision.change, f"{error}: {decision.reason}")


def train_rank(job: TrainJob, run: TrackedRun, live: bool = False) -> None:
    """Body of one rank."""
    from m2f.cluster.tracking.reporter import TrackingReporter
    from m2f.cluster.tracking.tracking import Tracking
    from m2f.cluster.train.live_view import LiveView
    from m2f.trainer.reporting import LogReporter, Reporters
    from m2f.trainer.worker import run_worker

    control = SignalControl()
    if os.environ["RANK"] != "0":
        run_worker(job, Reporters(), control)
        return
    max_steps = job.training.max_steps
    tracking = Tracking(run, "rank0")
    view = LiveView(job.run_folder.rpartition("/")[2], max_steps) if live else None
    outcome = "failed"
    try:
        if view is not None:
            view.start()
            view.begin_attempt(int(os.environ["WORLD_SIZE"]))
        state = run_worker(job, Reporters(view or LogReporter(max_steps), TrackingReporter(tracking)), control)
        outcome = "finished" if state.step >= max_steps else "stopped"
    finally:
        if view is not None:
            view.stop(outcome)
        tracking.close()


class SignalControl:
    """SIGTERM asks for the end after a last checkpoint. Made on every rank, so that none dies of the signal."""

    def __init__(self) -> None:
        self._stop = False
        signal.signal(signal.SIGTERM, self._handle)

    def stop_requested(self) -> bool:
        """Whether the signal came."""
        return self._stop

    def drain_requested(self) -> bool:
        """Never: machines that go away are Ray's business."""
        return False

    def metrics_arrived(self, step: int) -> bool:
        """Always: rank 0 writes them to disk itself."""
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
