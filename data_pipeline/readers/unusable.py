"""Annotations that are unusable because of errors in the annotation file itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2f.data_pipeline.errors import DataError
from m2f.model.format_count import format_count

_MAX_LISTED = 10
"""Number of images that a message lists. It counts the others."""


@dataclass(frozen=True, slots=True)
class UnusableAnnotation:
    """One annotation that a reader leaves out, with the reason."""

    source: str
    """Path of the annotation file."""
    message: str
    """Name of the annotation and the reason."""


def require_all_usable(unusable: Sequence[UnusableAnnotation]) -> None:
    """Raise DataError if there are unusable annotations. The message lists up to 10 of them and names the remedy."""
    if not unusable:
        return
    listed = [f"  {entry.source}: {entry.message}" for entry in unusable[:_MAX_LISTED]]
    if len(unusable) > _MAX_LISTED:
        listed.append(f"  and {len(unusable) - _MAX_LISTED} more")
    raise DataError(
        f"{format_count(len(unusable), 'annotation')} cannot be used. Correct them, or leave them out with "
        "--skip-bad:\n" + "\n".join(listed)
    )
