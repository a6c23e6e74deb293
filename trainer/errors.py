"""Errors of a training run."""

from __future__ import annotations

from typing import Any

from m2f.model.errors import UserError


class TrainingError(UserError):
    """A run cannot start, resume or continue. The message names the setting, step or rank, and the remedy."""


class CheckpointError(TrainingError):
    """A checkpoint is incomplete, damaged or from another run. The message names the file and the remedy."""


class NewerFormatError(TrainingError):
    """A newer version of this program wrote a file of the run. The file is intact, so nothing may replace it."""


class LeaseHeldError(TrainingError):
    """Another process trains in the run folder. The message names that process and the remedy."""


class LeaseLostError(TrainingError):
    """Another process has taken over the run folder, so this process must not write to it any more."""


class RankDiedError(RuntimeError):
    """A rank's process ended without raising an error. The message names the rank and how it ended."""


class PeersError(TrainingError):
    """Raised on every rank if any rank fails. Names the failed ranks; the cause is this rank's own error, if any."""


class OutOfMemoryError(TrainingError):
    """A micro-batch of `micro_batch` images does not fit into the device's memory."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch

    def __reduce__(self) -> tuple[Any, ...]:  # by default only the message of an exception is pickled
        return type(self), (str(self), self.micro_batch)


class LossSpikeError(TrainingError):
    """The loss left its usual range at positions `start` to `stop` - 1 of the data order. Equal on all ranks."""

    def __init__(self, message: str, start: int, stop: int) -> None:
        super().__init__(message)
        self.start, self.stop = start, stop

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.start, self.stop)
