"""What a store says about an object without reading it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as it was when asked for."""

    size: int
    """Bytes."""
    etag: str | None
    """Changes with every write of the object; None for files, whose checksums must do."""


@dataclass(frozen=True, slots=True)
class UnfinishedWrite:
    """What a write that was never completed has left in a store."""

    url: str
    """Object that was to be written; of a local write, its temporary file."""
    upload: str = ""
    """Id of a multipart upload; empty for a file."""
