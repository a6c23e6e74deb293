"""Size, time and content of source files, which tell later whether one has changed."""

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
    """A file as it was when it was read."""

    size: int
    mtime_ns: int
    """Time of its last change, as the file system says."""
    digest: bytes
    """SHA-256 of its content."""


_RECORD: ContextVar[dict[Path, FileState] | None] = ContextVar("record", default=None)


@contextmanager
def recorded_reads() -> Iterator[dict[Path, FileState]]:
    """The state of every file that `read_file` reads in this block: so that none is read twice for its digest."""
    record: dict[Path, FileState] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def read_file(path: Path) -> bytes:
    """Content of a file. Raises OSError."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())  # before the content: a change while it is read is noticed next time
        data = file.read()
    record = _RECORD.get()
    if record is not None:
        record[path] = FileState(found.st_size, found.st_mtime_ns, hashlib.sha256(data).digest())
    return data


def file_state(path: Path) -> FileState | None:
    """The state of a file; None where it cannot be read."""
    with recorded_reads() as record:
        try:
            read_file(path)
        except OSError:
            return None
    return record[path]
