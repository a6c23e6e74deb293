"""Pure functions that decide what the supervisor does after a failure, from the failures so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from m2f.data_pipeline.errors import LoaderDiedError, OutageError, StorageError
from m2f.model.errors import UserError
from m2f.model.format_count import format_count
from m2f.trainer.errors import LossSpikeError, OutOfMemoryError, PeersError, RankDiedError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import Change, SkipPositions, SmallerMicroBatch
from m2f.trainer.recovery.ending import Ending

FailureKind = Literal["mistake", "error", "outage", "death", "preemption", "resources", "memory", "spike", "collateral"]
"""Kinds of failures.

mistake: a restart would fail in the same way (an error of the user, or a bug).
error: an error that may be transient, unless it repeats unchanged.
outage: the storage did not answer for `storage.patience_s`.
death: a process or node died, or a health check failed.
preemption: the provider reclaimed a node.
resources: Ray found no resources for the workers within its timeout.
memory: a micro-batch does not fit into the memory of the device.
spike: the loss left its usual range.
collateral: a consequence of another rank's failure."""

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
"""Types of errors that a restart would repeat, unless an earlier rule of `classify` applies."""
_COLLATERAL_TEXTS = (
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
"""Parts of error messages that occur if a peer of the rank has failed."""
MAX_BACKOFF_S = 60.0
"""Longest pause in seconds before a restart. Pauses double from 1 s with each failure without progress."""
_UNCOUNTED_KINDS: tuple[FailureKind, ...] = ("preemption", "resources", "memory")
"""Kinds that do not count against `max_failures`."""


@dataclass(frozen=True)
class Failure:
    """The reason that an attempt ended before the last step."""

    rank: int | None
    """None if no single rank is the cause."""
    kind: FailureKind
    message: str
    """Type and text of the error, without a traceback."""
    micro_batch: int = 0
    """Only for kind `memory`: number of images per micro-batch that did not fit."""
    positions: PositionRange | None = None
    """Only for kind `spike`: positions of the samples in the data order."""


@dataclass(frozen=True)
class AttemptError:
    """What went wrong in an attempt: the error of each failed rank, or an error outside the ranks."""

    by_rank: Mapping[int, BaseException]
    details: str
    """Full details, to be written to a file."""
    other: BaseException | None = None
    """Error of the attempt if no rank has one, for example because the ranks could not be started."""


@dataclass(frozen=True)
class Attempt:
    """A failed attempt: one run of all ranks."""

    failure: Failure
    checkpoint_step: int
    """Step of the newest committed checkpoint at the end of the attempt; 0 if there is none."""


@dataclass(frozen=True)
class AttemptHistory:
    """All failed attempts of this supervisor, oldest first."""

    start_step: int = 0
    """Step of the newest committed checkpoint before the first attempt."""
    attempts: tuple[Attempt, ...] = ()

    def after(self, attempt: Attempt) -> AttemptHistory:
        """Return the history with one more attempt."""
        return AttemptHistory(self.start_step, (*self.attempts, attempt))

    def without_progress(self) -> tuple[Attempt, ...]:
        """Return the attempts since the last new checkpoint, beginning with the attempt that wrote it."""
        steps = [self.start_step, *(a.checkpoint_step for a in self.attempts)]
        first = max((i for i in range(len(self.attempts)) if steps[i + 1] > steps[i]), default=0)
        return self.attempts[first:]


@dataclass(frozen=True)
class Retry:
    """Decision to start the ranks again."""

    delay_s: float
    reason: str
    change: Change | None = None
    """Adjustment that applies from the next attempt on."""


@dataclass(frozen=True)
class Stop:
    """Decision to give up the run."""

    reason: str


def decide(history: AttemptHistory, max_failures: int) -> Retry | Stop:
    """Return what to do after the last attempt of `history`.

    - A mistake stops the run. So does an outage, because the ranks have already waited for the storage.
    - An error stops the run if it repeats with the same message without a new checkpoint in between.
    - Deaths and other errors are retried up to `max_failures` times without progress, with exponential backoff.
    - Preemptions and a lack of resources are retried and do not count as failures.
    - If memory runs out, the micro-batch is halved, which is not counted. A micro-batch of one image stops the run.
    - A loss spike counts as a failure; the run continues from a checkpoint before it and skips its samples.
    """
    streak = history.without_progress()
    last = streak[-1].failure
    if last.kind == "memory":
        return _halve_micro_batch(last.micro_batch)
    if last.kind == "mistake":
        return Stop("a restart would fail in the same way")
    if last.kind == "outage":
        return Stop("start the run again to continue from its last checkpoint")
    if last.kind == "preemption":
        return Retry(0.0, "the node was preempted")
    if last.kind == "resources":
        return Retry(0.0, "the cluster had too few free resources for the workers")
    if last.kind == "error" and any(a.failure.message == last.message for a in streak[:-1]):
        return Stop("the same error occurred again without a new checkpoint in between")
    num_failures = sum(a.failure.kind not in _UNCOUNTED_KINDS for a in streak)
    if num_failures > max_failures:
        return Stop(
            f"{format_count(num_failures, 'failure')} without a new checkpoint; cluster.max_failures allows "
            f"{max_failures}"
        )
    if last.positions is not None:
        return Retry(
            0.0, f"from the checkpoint before the spike, skipping {last.positions}", SkipPositions(last.positions)
        )
    return Retry(
        min(2.0 ** (num_failures - 1), MAX_BACKOFF_S),
        f"failure {num_failures} of at most {max_failures} without progress",
    )


def _halve_micro_batch(micro_batch: int) -> Retry | Stop:
    if micro_batch <= 1:
        return Stop(
            "a single image does not fit into memory; reduce the image size in data.augment, use more workers with a "
            "higher training.zero.stage, or set training.zero.offload_optimizer"
        )
    half = micro_batch // 2
    size = f"{format_count(half, 'image')} per micro-batch"
    reason = f"with {size} instead of {micro_batch}, and more micro-batches for the same global batch"
    return Retry(0.0, reason, SmallerMicroBatch(half))


def classify(error: BaseException) -> FailureKind:
    """Return the kind of one rank's error.

    Errors that Ray raises count as deaths, except for a preemption (attribute `preempted`) and a startup timeout.
    """
    error = getattr(error, "health_check_failure", error)
    if getattr(error, "preempted", False) or type(error).__name__ == "PreemptionError":
        return "preemption"
    if type(error).__name__ == "WorkerGroupStartupTimeoutError":
        return "resources"
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
    return "collateral" if any(part in text for part in _COLLATERAL_TEXTS) else "error"


def classify_attempt(error: AttemptError | None, ending: Ending | None) -> Failure:
    """Return why an attempt ended before the last step. `ending` is the record that a rank wrote to the run folder."""
    if ending is not None and ending.kind == "stalled":
        return Failure(None, "death", ending.message)  # the error only reports that processes ended
    if error is None:
        if ending is not None:
            return Failure(None, "preemption", ending.message)
        return Failure(None, "error", "the workers returned before the last step")
    if error.by_rank:
        return root_cause(error.by_rank)
    assert error.other is not None
    return Failure(None, classify(error.other), f"{type(error.other).__name__}: {error.other}")


def root_cause(errors: Mapping[int, BaseException]) -> Failure:
    """Return the failure of the lowest rank that is not a consequence of another rank's failure.

    If all failures are such consequences, a process is presumed to have died. A preemption takes precedence, because it
    explains every other error of the same attempt.
    """
    assert errors, "a failed attempt has at least one error"
    failures = [_failure(rank, error) for rank, error in sorted(errors.items())]
    for failure in failures:
        if failure.kind == "preemption":
            return failure
    for failure in failures:
        if failure.kind != "collateral":
            return failure
    return Failure(None, "death", f"every rank lost the connection to its peers ({failures[0].message})")


def _failure(rank: int, error: BaseException) -> Failure:
    message = f"{type(error).__name__}: {error}".strip()
    match error:
        case OutOfMemoryError(micro_batch=size):
            return Failure(rank, "memory", message, micro_batch=size)
        case LossSpikeError(start=start, stop=stop):
            return Failure(rank, "spike", message, positions=PositionRange(start, stop))
        case _:
            return Failure(rank, classify(error), message)
