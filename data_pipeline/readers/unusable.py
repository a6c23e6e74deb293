"""Annotations that cannot be used, as their file alone shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2f.data_pipeline.errors import DataError
from m2f.model.counted import counted

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class UnusableAnnotation:
    """One annotation that a reader leaves out, and why."""

    source: str
    """The annotation file."""
    message: str
    """Begins with the name of the annotation."""


def require_none(found: Sequence[UnusableAnnotation]) -> None:
    """Raise one DataError that names the annotations and the remedy, where there is one."""
    if not found:
        return
    listed = [f"  {entry.source}: {entry.message}" for entry in found[:_SHOWN]]
    if len(found) > _SHOWN:
        listed.append(f"  and {len(found) - _SHOWN} more")
    raise DataError(
        f"{counted(len(found), 'annotation')} cannot be used. Correct them, or leave them out with --skip-bad:\n"
        + "\n".join(listed)
    )
