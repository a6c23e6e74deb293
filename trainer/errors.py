"""Errors of a training run."""

from model.errors import UserError


class TrainingError(UserError):
    """A run that cannot start, resume or go on. Names the setting, step or rank and the remedy."""


class CheckpointError(TrainingError):
    """A checkpoint that is incomplete, damaged or belongs to another run. Names the file and the remedy."""


class PeersError(TrainingError):
    """Raised on every rank because some have an error: names them. The cause is this rank's own error, if any."""
