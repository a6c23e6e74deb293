"""Interfaces between the supervisor and the launchers (Ray Train or plain processes)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self

from m2f.cluster.evaluation.manager import EvaluationStatus
from m2f.cluster.tracking.tracking import TrackedRun
from m2f.cluster.train.failure_policy import AttemptError
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import Event


class Evaluations(Protocol):
    """Evaluates the commits of the run folder during or after training."""

    @property
    def failure_reason(self) -> str | None:
        """Why evaluations have stopped; None while they work. Pending evaluations run when the run is continued."""
        ...

    def training_ended(self) -> None:
        """Tell the evaluations that training has ended, so that they may use the whole machine."""
        ...

    def status(self) -> EvaluationStatus | None:
        """Return the entries of the queue and the running evaluation; None while they are unknown."""
        ...

    def close(self) -> None:
        """Stop evaluating."""
        ...


class Launcher(Protocol):
    """Starts the ranks of successive attempts. A context manager; the caller must hold the lease when entering it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def evaluations(self, tracked: TrackedRun) -> Evaluations:
        """Return the evaluations of the run. This is called once, and only if the recipe has evaluation sets."""
        ...

    def free_nodes(self) -> Iterable[Mapping[str, float]]:
        """Return the free resources of each node. This is only called if the number of workers may change."""
        ...

    def start(self, job: TrainJob, workers: int) -> None:
        """Start the ranks of an attempt."""
        ...

    @property
    def running(self) -> bool:
        """Whether any rank of the attempt is running."""
        ...

    def poll(self, stop: bool, wait_s: float) -> Sequence[Event]:
        """Wait up to `wait_s` seconds and return the events since the last poll.

        If `stop` is set, the ranks are asked to end after a checkpoint.
        """
        ...

    def attempt_error(self) -> AttemptError | None:
        """Return how the attempt failed; None if all ranks returned. The result is valid once no rank is running."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether the machine of this process is about to be reclaimed."""
        ...

    def describe_wait(self) -> str:
        """Return what ranks without a report may be waiting for; "" if unknown."""
        ...
