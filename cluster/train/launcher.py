"""What the supervisor needs of a way to start ranks: Ray Train or plain processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self

from m2f.cluster.evaluation.manager import EvaluationStatus
from m2f.cluster.evaluation.queue import Entry
from m2f.cluster.tracking.tracking import TrackedRun
from m2f.cluster.train.failure_policy import AttemptError
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import Event


class Evaluations(Protocol):
    """Evaluates the commits of the run folder while or after ranks train."""

    @property
    def lost(self) -> str | None:
        """Why nothing evaluates any more; what waits is done when the run is continued."""
        ...

    def training_ended(self) -> None:
        """All steps are done: the machine is free for evaluations."""
        ...

    def status(self) -> EvaluationStatus | None:
        """Entries and the running evaluation; None while that is not known."""
        ...

    def entries(self) -> tuple[Entry, ...]:
        """The stored ledger."""
        ...

    def close(self) -> tuple[Entry, ...]:
        """End what evaluates; the entries as they are stored."""
        ...


class Launcher(Protocol):
    """Starts the ranks of one attempt after the other. A context manager, entered under the lease."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def evaluations(self, tracked: TrackedRun) -> Evaluations:
        """Made once, where the recipe evaluates."""
        ...

    def free_nodes(self) -> Iterable[Mapping[str, float]]:
        """Free resources by node, for runs whose number of workers may change."""
        ...

    def start(self, job: TrainJob, workers: int) -> None:
        """Begin an attempt."""
        ...

    @property
    def running(self) -> bool:
        """Whether a rank of the attempt runs."""
        ...

    def poll(self, stop: bool, wait_s: float) -> Sequence[Event]:
        """Events since the last poll, after up to `wait_s` seconds; `stop` asks the ranks to end after a checkpoint."""
        ...

    def error(self) -> AttemptError | None:
        """How the attempt failed, once nothing runs; None where all ranks returned."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether the machine of this process is about to be taken away."""
        ...

    def describe_wait(self) -> str:
        """What ranks that have not reported yet may wait for; "" where that is not known."""
        ...
