"""Decisions of the supervisor after a failure, as pure functions of what has happened so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from m2f.data_pipeline.errors import LoaderDiedError, OutageError, StorageError
from m2f.model.counted import counted
from m2f.model.errors import UserError
from m2f.trainer.errors import LossSpikeError, OutOfMemoryError, PeersError, RankDiedError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import Change, SkipPositions, SmallerMicroBatch
from m2f.trainer.recovery.ending import Ending

FailureKind = Literal["mistake", "error", "outage", "death", "preemption", "room", "memory", "spike", "collateral"]
"""mistake: running again gives the same (a user's error, a bug); error: may pass, until it comes back unchanged;
outage: the storage did not answer for longer than its patience; death: a process, node or health check; preemption: a
node that was taken back; room: the cluster had none for the workers within Ray's patience; memory: that of the device
is too small for a micro-batch; spike: the loss left its usual range; collateral: echo of a peer's failure."""

_MISTAKES = (
    UserError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_ECHOES = (
    "connection reset by peer",
    "connection closed by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "gloo",
    "nccl",
    "distbackenderror",
    "collective",
)
MAX_BACKOFF_S = 60.0
_FREE: tuple[FailureKind, ...] = ("preemption", "room", "memory")
"""Kinds that do not count against `max_failures`."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended: the root cause of the lowest rank that has one."""

    rank: int | None
    """None where no single rank is to blame."""
    kind: FailureKind
    message: str
    """Type and text of the error, without a traceback."""
    micro_batch: int = 0
    """memory: images that were too many."""
    positions: PositionRange | None = None
    """spike: its samples."""


@dataclass(frozen=True)
class AttemptError:
    """How the ranks of an attempt failed."""

    by_rank: Mapping[int, BaseException]
    story: str
    """Everything that is known, for a file."""
    other: BaseException | None = None
    """Set where no rank has an error, for example if they could not be started."""


@dataclass(frozen=True)
class Attempt:
    """One run of the worker group that failed."""

    failure: Failure
    checkpoint_step: int
    """Step of the newest committed checkpoint when it ended; 0 for none."""


@dataclass(frozen=True)
class AttemptHistory:
    """Every failed attempt of this supervisor, oldest first."""

    start_step: int = 0
    """Step of the newest committed checkpoint before the first attempt."""
    attempts: tuple[Attempt, ...] = ()

    def after(self, attempt: Attempt) -> AttemptHistory:
        """The history with one more attempt."""
        return AttemptHistory(self.start_step, (*self.attempts, attempt))

    def without_progress(self) -> tuple[Attempt, ...]:
        """The trailing attempts since the last new checkpoint; the one that wrote it comes first."""
        steps = [self.start_step, *(a.checkpoint_step for a in self.attempts)]
        first = max((i for i in range(len(self.attempts)) if steps[i + 1] > steps[i]), default=0)
        return self.attempts[first:]


@dataclass(frozen=True)
class Retry:
    """Start the worker group again."""

    delay_s: float
    reason: str
    change: Change | None = None
    """What must be different from now on."""


@dataclass(frozen=True)
class Stop:
    """Give up."""

    reason: str


def decide(history: AttemptHistory, max_failures: int) -> Retry | Stop:
    """What to do after the last attempt of `history`.

    Mistakes stop at once, and so do outages, for which the ranks have waited, and an error that comes back word for
    word without a new checkpoint in between. Deaths are retried with exponential backoff up to `max_failures` times
    without progress. Preemptions cost nothing, nor does a lack of memory while the micro-batch can be halved. After a
    loss spike its samples are left out.
    """
    streak = history.without_progress()
    last = streak[-1].failure
    if last.kind == "memory":
        return _halve(last.micro_batch)
    if last.kind == "mistake":
        return Stop("the same would happen again")
    if last.kind == "outage":
        return Stop("the run goes on from its last checkpoint when it is started again")
    if last.kind == "preemption":
        return Retry(0.0, "the node was taken back")
    if last.kind == "room":
        return Retry(0.0, "the cluster had no room for the workers")
    if last.kind == "error" and any(a.failure.message == last.message for a in streak[:-1]):
        return Stop("the same error came back without a new checkpoint in between")
    spent = sum(a.failure.kind not in _FREE for a in streak)
    if spent > max_failures:
        return Stop(f"{counted(spent, 'failure')} without a new checkpoint; cluster.max_failures allows {max_failures}")
    if last.positions is not None:
        return Retry(0.0, f"from the checkpoint before, without {last.positions}", SkipPositions(last.positions))
    return Retry(min(2.0 ** (spent - 1), MAX_BACKOFF_S), f"failure {spent} of at most {max_failures} without progress")


def _halve(micro_batch: int) -> Retry | Stop:
    if micro_batch <= 1:
        return Stop(
            "a single image does not fit into memory; make data.augment smaller, use more workers with a higher "
            "training.zero.stage, or set training.zero.offload_optimizer"
        )
    half = micro_batch // 2
    size = f"{counted(half, 'image')} per micro-batch"
    reason = f"with {size} instead of {micro_batch} and more of them, the same global batch"
    return Retry(0.0, reason, SmallerMicroBatch(half))


def classify(error: BaseException) -> FailureKind:
    """Kind of one rank's error. What Ray itself raised is a death; `preempted` is Ray's mark of a lost node."""
    error = getattr(error, "health_check_failure", error)
    if getattr(error, "preempted", False) or type(error).__name__ == "PreemptionError":
        return "preemption"
    if type(error).__name__ == "WorkerGroupStartupTimeoutError":
        return "room"
    if type(error).__module__.split(".")[0] == "ray":
        return "death"
    if isinstance(error, LoaderDiedError | RankDiedError):
        return "death"
    if isinstance(error, StorageError):
        return "outage" if isinstance(error, OutageError) else "error"
    if isinstance(error, PeersError):
        return "collateral"
    if isinstance(error, OutOfMemoryError):
        return "memory"
    if isinstance(error, LossSpikeError):
        return "spike"
    if isinstance(error, _MISTAKES):
        return "mistake"
    text = f"{type(error).__name__}: {error}".lower()
    return "collateral" if any(echo in text for echo in _ECHOES) else "error"


def failure_of(error: AttemptError | None, ending: Ending | None) -> Failure:
    """Why an attempt ended before the last step; `ending` is what a rank left in the run folder."""
    if ending is not None and ending.kind == "stalled":
        return Failure(None, "death", ending.message)  # the error only says that processes are gone
    if error is None:
        if ending is not None:
            return Failure(None, "preemption", ending.message)
        return Failure(None, "error", "the workers returned before the last step")
    if error.by_rank:
        return root_cause(error.by_rank)
    assert error.other is not None
    return Failure(None, classify(error.other), f"{type(error.other).__name__}: {error.other}")


def root_cause(errors: Mapping[int, BaseException]) -> Failure:
    """The failure of the lowest rank that is not the echo of another rank's. All echoes: some process has died.

    A preempted node explains every other error of the same attempt.
    """
    assert errors, "a failed attempt has at least one error"
    failures = [_failure(rank, error) for rank, error in sorted(errors.items())]
    for failure in failures:
        if failure.kind == "preemption":
            return failure
    for failure in failures:
        if failure.kind != "collateral":
            return failure
    return Failure(None, "death", f"every rank lost its peers ({failures[0].message})")


def _failure(rank: int, error: BaseException) -> Failure:
    message = f"{type(error).__name__}: {error}".strip()
    match error:
        case OutOfMemoryError(micro_batch=size):
            return Failure(rank, "memory", message, micro_batch=size)
        case LossSpikeError(start=start, stop=stop):
            return Failure(rank, "spike", message, positions=PositionRange(start, stop))
        case _:
            return Failure(rank, classify(error), message)
