"""Errors of a training run."""

from __future__ import annotations

from typing import Any

from m2f.model.errors import UserError


class TrainingError(UserError):
    """A run that cannot start, resume or go on. Names the setting, step or rank and the remedy."""


class CheckpointError(TrainingError):
    """A checkpoint that is incomplete, damaged or belongs to another run. Names the file and the remedy."""


class NewerFormatError(TrainingError):
    """A file of the run was written by a newer version of this program: it is no damage, and nothing may replace it."""


class LeaseHeldError(TrainingError):
    """Another process trains in the run folder. Names it and the remedy."""


class LeaseLostError(TrainingError):
    """Another process has taken the run folder over; this one must not write to it any more."""


class RankDiedError(RuntimeError):
    """A rank's process ended without an error of its own. Names the rank and how it ended."""


class PeersError(TrainingError):
    """Raised on every rank because some have an error: names them. The cause is this rank's own error, if any."""


class OutOfMemoryError(TrainingError):
    """The device's memory does not hold a micro-batch of `micro_batch` images."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions are pickled by their message alone
        return type(self), (str(self), self.micro_batch)


class LossSpikeError(TrainingError):
    """The loss has left its usual range over the positions `start` to `stop` of the data order; equal on all ranks."""

    def __init__(self, message: str, start: int, stop: int) -> None:
        super().__init__(message)
        self.start, self.stop = start, stop

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.start, self.stop)
