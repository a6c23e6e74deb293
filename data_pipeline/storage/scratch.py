"""Temporary folders of a process. The folders of killed processes are removed by later processes.

A process holds a lock on a file in its folder as long as it lives. The kernel releases the lock when the process ends,
even if it is killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from m2f.data_pipeline.errors import StorageError

_PREFIX = "m2f-"
_FULL_DISK_MESSAGES = ("no space left", "disk quota exceeded", "inline_container", "iostream error")
"""Parts of error messages about a full disk, from the operating system, safetensors and torch (the last two)."""
_LOCK = ".lock"
_FILES = "files"
_SWEEP_LOCK = threading.Lock()
_swept: set[str] = set()


class ScratchFolder:
    """Temporary folder `path` on the local disk, deleted by `remove` or at the end of the context."""

    def __init__(self, purpose: str, parent: str | None = None) -> None:
        """Create the folder. The first one of a process in `parent` also removes folders of dead processes there.

        Args:
            purpose: part of the folder's name.
            parent: folder to create it in; None uses the folder for temporary files.

        Raises:
            StorageError: the folder cannot be created.
        """
        try:
            parent = parent or tempfile.gettempdir()
            _sweep_once(parent)
            self.root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=parent))
            self.path = self.root / _FILES
            try:
                self.path.mkdir()
                descriptor, name = tempfile.mkstemp(dir=self.path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                Path(name).rename(self.root / _LOCK)  # locked before it becomes visible to `sweep`
            except OSError:
                shutil.rmtree(self.root, ignore_errors=True)  # `sweep` keeps folders without a lock
                raise
        except OSError as error:
            raise StorageError(
                f"{parent or 'temporary files'}: cannot create a folder there ({error}); free some space, or set "
                "TMPDIR to a folder on another disk"
            ) from error
        self._descriptor = descriptor

    def remove(self) -> None:
        """Delete the folder. A missing folder is ignored."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._close()

    def keep(self) -> None:
        """Keep the folder for inspection. It is not removed automatically."""
        (self.root / _LOCK).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


@contextmanager
def report_full_disk(what: str) -> Iterator[None]:
    """In this context, turn errors of a full local disk into a StorageError that names `what`.

    Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if "TMPDIR" in str(error) or not any(words in str(error).lower() for words in _FULL_DISK_MESSAGES):
            raise
        raise StorageError(
            f"{tempfile.gettempdir()}: no space left on the disk for {what} ({error.__cause__ or error}); free some "
            "space, or set TMPDIR to a folder on a larger disk"
        ) from error


def require_free_space(
    size: int,
    what: str,
    path: str | None = None,
    remedy: str = "free some space, or set TMPDIR to a folder on a larger disk",
) -> None:
    """Raise StorageError if the disk of `path` has less than `size` bytes free.

    Args:
        size: bytes needed.
        what: the data to be stored, for the message.
        path: a folder, which may not exist yet; None uses the folder for temporary files.
        remedy: last clause of the message.
    """
    folder = Path(path or tempfile.gettempdir()).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{folder}: {free / 1e6:,.1f} MB are free on the disk, but {what} needs {size / 1e6:,.1f} MB; {remedy}"
        )


def sweep(parent: str) -> int:
    """Delete the scratch folders of dead processes in `parent` and return their number.

    Folders without a lock file are kept, regardless of their age. They were either kept for inspection or come from an
    earlier version; the two cannot be distinguished.
    """
    removed = 0
    for lock in Path(parent).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
                removed += 1
        except OSError:  # in use, owned by another user, or removed by another process
            continue
    return removed


def _sweep_once(parent: str) -> None:
    with _SWEEP_LOCK:
        if parent not in _swept:
            _swept.add(parent)
            sweep(parent)
