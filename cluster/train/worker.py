"""What runs inside a Ray Train worker: the trainer's loop, with a reporter and a control that speak to our actors.

A module of its own, so that Ray pickles the worker function by reference.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train

from m2f.cluster.ray_private import preemption_notice, quiet_reports
from m2f.cluster.train.mailbox import CheckpointReport, EventReport, MetricsReport, Word
from m2f.cluster.train.prometheus import PrometheusReporter
from m2f.trainer.errors import PeersError
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import CommittedCheckpoint, EventKind, Reporters

LOGGER = logging.getLogger(__name__)
POLL_S = 1.0


@dataclass(frozen=True)
class WorkerSettings:
    """What the supervisor hands to every worker."""

    job: TrainJob
    board: Any
    """Handle of the RunBoard."""


def train_loop(arguments: dict[str, WorkerSettings]) -> None:
    """Train on this rank until the run is done, stopped or drained."""
    settings = arguments["settings"]
    context = ray.train.get_context()
    os.environ["LOCAL_SIZE"] = str(context.get_local_world_size())  # DeepSpeed's device count on CPU
    if not ray.get_gpu_ids():
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    from m2f.trainer.worker import run_worker  # deepspeed reads the environment when it is imported

    quiet_reports()
    rank, run_name = context.get_world_rank(), settings.job.run_folder.rpartition("/")[2]
    control = RayControl(settings.board) if rank == 0 else NoControl()
    reporter = Reporters(RayReporter(settings.board, rank), PrometheusReporter(run_name, rank))
    try:
        run_worker(settings.job, reporter, control)
    except PeersError as error:
        raise (error.__cause__ or error) from None  # a cause is lost on the way to the supervisor


class RayReporter:
    """Reports to the board and to Ray Train. Calls to actors are sent, never waited for."""

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._rank = rank

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """To the board."""
        self._board.pin.remote(MetricsReport(step, dict(values)))

    def rank_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: they go to Prometheus."""

    def checkpoint(self, checkpoint: CommittedCheckpoint) -> None:
        """Rank 0: to the board, from where it is queued for evaluation. Every rank: to Ray Train, without files."""
        if self._rank == 0:
            self._board.pin.remote(CheckpointReport(checkpoint))
        # No ray.train.Checkpoint: Ray accepts only those in its own folder, and ours outlive its attempts.
        ray.train.report(
            {"step": checkpoint.step, "checkpoint": checkpoint.url},
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def event(self, kind: EventKind, step: int, message: str) -> None:
        """To the board."""
        self._board.pin.remote(EventReport(kind, step, message))


class NoControl:
    """For ranks that are not asked."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def drain_requested(self) -> bool:
        """Never."""
        return False

    def metrics_arrived(self, step: int) -> bool:
        """Always: only rank 0 has any."""
        return True


class RayControl:
    """The driver's word, which a thread reads from the board, and Ray's notice that a worker's node goes away."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._word = Word()
        threading.Thread(target=self._poll, name="control", daemon=True).start()
        self._preempted = preemption_notice()

    def stop_requested(self) -> bool:
        """Whether the driver was asked to end the run."""
        return self._word.stop

    def drain_requested(self) -> bool:
        """Whether Ray was told that a node of the run goes away."""
        return self._preempted()

    def metrics_arrived(self, step: int) -> bool:
        """Whether the driver had written them to its disk when it was last heard of."""
        return step <= self._word.metrics_step

    def _poll(self) -> None:
        while True:
            time.sleep(POLL_S)
            try:
                self._word = ray.get(self._board.word.remote(), timeout=30)
            except ray.exceptions.RayError as error:
                LOGGER.debug("the board does not answer: %s", error)
