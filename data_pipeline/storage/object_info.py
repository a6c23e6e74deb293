"""Information of a store about objects and unfinished writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Size and version of an object at the time of the request."""

    size: int
    """Size in bytes."""
    etag: str | None
    """Version, which changes with every write of the object. None for local files; compare checksums there."""


@dataclass(frozen=True, slots=True)
class UnfinishedWrite:
    """An incomplete write in a store."""

    url: str
    """URL of the object to be written; for local writes, path of the temporary file."""
    upload: str = ""
    """Id of the multipart upload; empty for local files."""
