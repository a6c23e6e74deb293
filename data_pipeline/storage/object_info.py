"""Metadata of stored objects and of unfinished writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Size and version of an object at the time of the request."""

    size: int
    """Size in bytes."""
    etag: str | None
    """Identifies this version of the content. None for local files; compare their checksums instead."""


@dataclass(frozen=True, slots=True)
class UnfinishedWrite:
    """A write in a store that is still running or was interrupted."""

    url: str
    """URL of the object to be written; for local writes, path of the temporary file."""
    upload: str = ""
    """Id of the multipart upload; empty for local files."""
