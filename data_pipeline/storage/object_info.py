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
