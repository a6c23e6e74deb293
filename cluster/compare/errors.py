"""The error of comparisons."""

from m2f.model.errors import UserError


class CompareError(UserError):
    """Runs cannot be found, read or compared. The message names the run or tracking server, and the remedy."""
