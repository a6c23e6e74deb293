"""Errors of evaluation."""

from m2f.model.errors import UserError


class EvaluationError(UserError):
    """Results that cannot be computed, merged or published. Names the image, file or setting and the remedy."""
