"""Folders for files that only this process needs; what a killed process leaves is removed by the next start.

A process holds a lock on a file in its folder for as long as it lives: the kernel lets go of it whatever ends it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from m2f.data_pipeline.errors import StorageError

_FULL = ("no space left", "disk quota exceeded", "inline_container", "iostream error")
"""What the system, safetensors and (the last two) torch say where a write is refused."""
_LOCK = ".lock"
_FILES = "files"


class ScratchFolder:
    """A folder `path` on the local disk until `remove` is called or the context left."""

    def __init__(self, prefix: str) -> None:
        """`prefix` begins the folder's name; `sweep` takes it again."""
        self._root = Path(tempfile.mkdtemp(prefix=prefix))
        self.path = self._root / _FILES
        self.path.mkdir()
        descriptor, name = tempfile.mkstemp(dir=self.path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        Path(name).rename(self._root / _LOCK)  # already locked when it can be found
        self._descriptor = descriptor

    def remove(self) -> None:
        """Delete the folder; harmless when it is gone."""
        shutil.rmtree(self._root, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@contextmanager
def full_disk_named(what: str) -> Iterator[None]:
    """Raise StorageError where the local disk does not hold `what`; other errors pass."""
    try:
        yield
    except Exception as error:
        if not any(words in str(error).lower() for words in _FULL):
            raise
        raise StorageError(
            f"{tempfile.gettempdir()}: no space left on the disk for {what} ({error}); free some space, or set TMPDIR "
            "to a folder on a larger disk"
        ) from error


def sweep(prefix: str) -> int:
    """Delete the folders of processes that do not live any more; how many there were."""
    removed = 0
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
                removed += 1
        except OSError:  # in use, another user's, or swept by a neighbour
            continue
    return removed
