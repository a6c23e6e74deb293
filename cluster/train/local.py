"""`m2f train --launcher local`: run ranks as plain processes on this machine, and evaluate in the driver's process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

import torch

from m2f.cluster.evaluation.local_pool import LocalPool
from m2f.cluster.evaluation.manager import EvaluationStatus
from m2f.cluster.evaluation.service import EvaluationService
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.start.settling import local_devices, settled_run
from m2f.cluster.terminal import print_out
from m2f.cluster.tracking.tracking import TrackedRun
from m2f.cluster.train.failure_policy import AttemptError
from m2f.cluster.train.local_rank import train_rank, worker_environment
from m2f.cluster.train.processes import RankProcesses
from m2f.cluster.train.supervisor import RunSummary, run_supervised
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import Event


def train_locally(config: RunConfig, live: bool = False) -> RunSummary:
    """Train a recipe on this machine's GPUs or CPU and return a summary of the run.

    `cluster.num_workers` processes are started; if it is a range, its maximum counts. The supervisor is the same as
    with Ray: it restarts after failures within `cluster.max_failures`, tracks the run and applies adjustments. This
    process evaluates the checkpoints: during training if `training.early_stopping` is set, otherwise after the last
    step. SIGINT or SIGTERM stops the run after a checkpoint. With `live`, the terminal shows a panel instead of log
    lines.

    Raises:
        UserError: the recipe, the data or the tracking store cannot be used.
        LeaseHeldError: another process is training in the run folder.
        LeaseLostError: another process took over the run folder, because this one did not renew its lease.
    """
    config = settled_run(config, local_devices(), during_training=config.training.early_stopping is not None)
    cluster = replace(config.cluster, num_workers=config.cluster.max_workers)
    return run_supervised(config, LocalLauncher(replace(config, cluster=cluster)), live)


class LocalLauncher:
    """Launcher that runs ranks as processes on this machine."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._ranks: RankProcesses | None = None
        self._stop_requested = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def evaluations(self, tracked: TrackedRun) -> LocalEvaluations:
        """Return evaluations that run in this process."""
        return LocalEvaluations(self._config, tracked)

    def free_nodes(self) -> Iterable[Mapping[str, float]]:
        """Return an empty result, because the number of workers of a local run is fixed."""
        return ()

    def start(self, job: TrainJob, workers: int) -> None:
        """Start the processes of an attempt, after ending those of the previous one."""
        self._stack.close()
        ranks = RankProcesses(train_rank, (job,), workers, worker_environment(self._config))
        self._ranks, self._stop_requested = self._stack.enter_context(ranks), False

    @property
    def running(self) -> bool:
        """Whether any process is running."""
        return self._ranks is not None and self._ranks.running

    def poll(self, stop: bool, wait_s: float) -> Sequence[Event]:
        """Wait up to `wait_s` seconds and return the events that rank 0 has posted."""
        if self._ranks is None or not self._ranks.running:
            time.sleep(wait_s)
            return () if self._ranks is None else self._ranks.receive(0.0)
        if stop and not self._stop_requested:
            self._stop_requested = True
            self._ranks.ask_to_stop()
        return self._ranks.receive(wait_s)

    def attempt_error(self) -> AttemptError | None:
        """Return the errors of the ranks, with the traceback of the rank that caused them; None if none failed."""
        assert self._ranks is not None
        if (found := self._ranks.first_error()) is None:
            return None
        return AttemptError({rank: failed.error for rank, failed in self._ranks.errors.items()}, f"{found[1]}\n")

    @property
    def is_draining(self) -> bool:
        """Always False: a local run receives no notice of a shutdown."""
        return False

    def describe_wait(self) -> str:
        """Return "", because local processes start at once and wait for nothing."""
        return ""


class LocalEvaluations:
    """Evaluations in this process: after training, or during training if `training.early_stopping` is set."""

    def __init__(self, config: RunConfig, tracked: TrackedRun) -> None:
        self._config, self._tracked = config, tracked
        self._service: EvaluationService | None = None
        if config.training.early_stopping is not None:
            ranks = config.cluster.max_workers  # the ranks use the first GPUs
            gpu = ranks if torch.cuda.device_count() > ranks else 0
            self._service = EvaluationService(config, tracked, lambda config: LocalPool(config, gpu))

    @property
    def failure_reason(self) -> str | None:
        """Why evaluations have stopped; None while they work and before they begin."""
        return None if self._service is None else self._service.status().failure_reason

    def training_ended(self) -> None:
        """Start evaluating, unless evaluations already run during training."""
        if self._service is None:
            print_out("all steps are done; evaluating checkpoints in this process")
            self._service = EvaluationService(self._config, self._tracked, LocalPool)

    def status(self) -> EvaluationStatus | None:
        """Return the state of the evaluations; None before they begin."""
        return None if self._service is None else self._service.status()

    def close(self) -> None:
        """Send pending MLflow entries if no evaluation is running.

        A running evaluation is lost when this process ends, and repeated when the run is continued.
        """
        if self._service is not None and self._service.status().idle:
            self._service.close()
