"""Code that runs in a Ray Train worker: the training loop, with a reporter and a control that use the mailbox.

The worker function has its own module, so that Ray pickles it by reference.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train

from m2f.cluster.ray_private import preemption_notice, quiet_reports
from m2f.cluster.recipe.devices import device_index
from m2f.cluster.train.prometheus import PrometheusReporter
from m2f.trainer.errors import PeersError
from m2f.trainer.job import ManualControl, TrainJob
from m2f.trainer.reporting import CommitReport, Event, RankReport, Reporters

LOGGER = logging.getLogger(__name__)
POLL_S = 1.0
"""Pause in seconds between two polls of the mailbox. A request to stop arrives at most this late."""


@dataclass(frozen=True)
class WorkerSettings:
    """Arguments that the supervisor passes to every worker."""

    job: TrainJob
    mailbox: Any
    """Handle of the Mailbox."""


def train_loop(arguments: dict[str, WorkerSettings]) -> None:
    """Train on this rank until the run is done, stopped or drained."""
    settings = arguments["settings"]
    context = ray.train.get_context()
    os.environ["LOCAL_SIZE"] = str(context.get_local_world_size())  # the device count that DeepSpeed uses on CPUs
    _use_assigned_gpu(ray.get_gpu_ids())
    from m2f.trainer.worker import run_worker  # deepspeed reads the environment when it is imported

    quiet_reports()
    rank, run_name = context.get_world_rank(), settings.job.run_folder.rpartition("/")[2]
    control = RayControl(settings.mailbox) if rank == 0 else ManualControl()  # only rank 0 needs the driver's requests
    reporter = Reporters(RayReporter(settings.mailbox, rank == 0), PrometheusReporter(run_name, rank))
    try:
        run_worker(settings.job, reporter, control)
    except PeersError as error:
        raise (error.__cause__ or error) from None  # pickling for the supervisor drops the cause


def _use_assigned_gpu(assigned: list[Any]) -> None:
    """Make torch and DeepSpeed use the GPU that Ray assigned to this rank. Its index can differ from the local rank.

    `CheckedTorch` has already checked that torch sees the GPU.
    """
    if not assigned:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return
    os.environ["LOCAL_RANK"] = str(device_index(assigned, os.environ.get("CUDA_VISIBLE_DEVICES")))


class RayReporter:
    """Posts events to the driver's mailbox without waiting; also reports commits to Ray Train."""

    def __init__(self, mailbox: Any, is_first: bool) -> None:
        self._mailbox = mailbox
        self._is_first = is_first

    def report(self, event: Event) -> None:
        """Post an event. RankReport is ignored, because PrometheusReporter exports it."""
        match event:
            case RankReport():
                pass
            case CommitReport(checkpoint):
                if self._is_first:
                    self._mailbox.post.remote(event)
                # Passes no ray.train.Checkpoint: Ray accepts only those in its own folder, but the run's checkpoints
                # must outlive the attempt.
                ray.train.report(
                    {"step": checkpoint.step, "checkpoint": checkpoint.url},
                    checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
                )
            case _:
                self._mailbox.post.remote(event)


class RayControl:
    """Control for rank 0: the driver's request to stop, polled in a thread, and Ray's notice of a preemption."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._stop = False
        threading.Thread(target=self._poll, name="control", daemon=True).start()
        self._preempted = preemption_notice()

    def stop_requested(self) -> bool:
        """Return whether the driver has asked the run to stop."""
        return self._stop

    def drain_requested(self) -> bool:
        """Return whether Ray has announced that a node of the run is about to be reclaimed."""
        return self._preempted()

    def _poll(self) -> None:
        while True:
            time.sleep(POLL_S)
            try:
                self._stop = ray.get(self._mailbox.stop_requested.remote(), timeout=30)
            except ray.exceptions.RayError as error:
                LOGGER.debug("the mailbox does not respond: %s", error)
