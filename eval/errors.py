"""Errors of evaluation."""

from m2f.model.errors import UserError


class EvaluationError(UserError):
    """Results cannot be computed, merged or published. The message names the image, file or setting, and the remedy."""
