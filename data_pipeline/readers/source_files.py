"""Size, modification time and digest of source files, used to detect changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileState:
    """State of a file when it was read."""

    size: int
    """Size in bytes."""
    mtime_ns: int
    """Modification time in nanoseconds, from the file system."""
    digest: bytes
    """SHA-256 of the content."""


_RECORD: ContextVar[dict[Path, FileState] | None] = ContextVar("record", default=None)


@contextmanager
def recorded_reads() -> Iterator[dict[Path, FileState]]:
    """Record the state of each file that `read_file` reads in this context.

    This avoids reading the files a second time to compute their digests.
    """
    record: dict[Path, FileState] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def read_file(path: Path) -> bytes:
    """Return the content of a file. Inside `recorded_reads`, also record its state. Raises OSError if reading fails."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())  # before the content, so that a change during the read is detected next time
        data = file.read()
    record = _RECORD.get()
    if record is not None:
        record[path] = FileState(status.st_size, status.st_mtime_ns, hashlib.sha256(data).digest())
    return data


def file_state(path: Path) -> FileState | None:
    """Read a file and return its state; None if it cannot be read."""
    with recorded_reads() as record:
        try:
            read_file(path)
        except OSError:
            return None
    return record[path]
