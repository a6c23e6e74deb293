"""One rank of a local run, in its own process. This module imports little, so that the process starts quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.train.processes import Post
from m2f.cluster.train.signals import handling_signals
from m2f.trainer.errors import PeersError
from m2f.trainer.job import ManualControl, TrainJob
from m2f.trainer.reporting import Event, RankReport, Reporters


def train_rank(job: TrainJob, post: Post) -> None:
    """Train until the run is done, or until SIGINT or SIGTERM ends it after a checkpoint."""
    with stopped_by_signals() as control:
        from m2f.trainer.worker import run_worker  # DeepSpeed reads the environment when it is imported

        try:
            run_worker(job, PostReporter(post) if os.environ["RANK"] == "0" else Reporters(), control)
        except PeersError as error:  # lets the driver classify this rank's own error
            raise (error.__cause__ or error) from None


class PostReporter:
    """Reporter that posts the events of rank 0 to the driver."""

    def __init__(self, post: Post) -> None:
        self._post = post

    def report(self, event: Event) -> None:
        """Post an event. RankReport is ignored, because StepReport summarizes all ranks."""
        if not isinstance(event, RankReport):
            self._post(event)


@contextmanager
def stopped_by_signals() -> Iterator[ManualControl]:
    """Yield a control whose `stop` is set by SIGINT or SIGTERM. Every rank uses one, so the signal kills no rank."""
    control = ManualControl()

    def stop(number: signal.Signals) -> None:
        control.stop = True

    with handling_signals(stop):
        yield control


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return environment variables that a rank needs before it imports torch and DeepSpeed."""
    environment = {"OMP_NUM_THREADS": str(config.training.threads)}
    if not config.cluster.gpus_per_worker:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
