"""Folders for files that only this process needs; what a killed process leaves is removed by the next one.

A process holds a lock on a file in its folder for as long as it lives: the kernel lets go of it whatever ends it.
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
_FULL = ("no space left", "disk quota exceeded", "inline_container", "iostream error")
"""What the system, safetensors and (the last two) torch say where a write is refused."""
_LOCK = ".lock"
_FILES = "files"
_SWEEPING = threading.Lock()
_swept: set[str] = set()


class ScratchFolder:
    """A folder `path` on the local disk until `remove` is called or the context left."""

    def __init__(self, purpose: str, place: str | None = None) -> None:
        """`purpose` is part of the name; `place` is the folder to make it in, by default that of temporary files.

        The first one of a process sweeps what dead processes have left in `place`. Raises StorageError.
        """
        try:
            place = place or tempfile.gettempdir()
            _sweep_once(place)
            self.root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=place))
            self.path = self.root / _FILES
            self.path.mkdir()
            descriptor, name = tempfile.mkstemp(dir=self.path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            Path(name).rename(self.root / _LOCK)  # already locked when it can be found
        except OSError as error:
            raise StorageError(
                f"{place or 'temporary files'}: no folder can be made there ({error}); free some space, or set TMPDIR "
                "to a folder on another disk"
            ) from error
        self._descriptor = descriptor

    def remove(self) -> None:
        """Delete the folder; harmless when it is gone."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._close()

    def keep(self) -> None:
        """Leave the folder for a person to look at: nothing sweeps it."""
        (self.root / _LOCK).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
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
        if "TMPDIR" in str(error) or not any(words in str(error).lower() for words in _FULL):
            raise
        raise StorageError(
            f"{tempfile.gettempdir()}: no space left on the disk for {what} ({error.__cause__ or error}); free some "
            "space, or set TMPDIR to a folder on a larger disk"
        ) from error


def require_room(
    size: int,
    what: str,
    place: str | None = None,
    remedy: str = "free some space, or set TMPDIR to a folder on a larger disk",
) -> None:
    """Raise StorageError where the disk of `place` has less than `size` bytes left for `what`.

    `place` is a folder that may not exist yet, by default that of temporary files.
    """
    folder = Path(place or tempfile.gettempdir()).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{folder}: {free / 1e6:,.1f} MB are free on the disk, and {what} takes {size / 1e6:,.1f} MB; {remedy}"
        )


def sweep(place: str) -> int:
    """Delete the scratch folders in `place` of processes that do not live any more; how many there were.

    Folders without a lock stay, whatever their age: somebody has kept them to look at, or an earlier version left
    them, and no sign tells these apart.
    """
    removed = 0
    for lock in Path(place).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
                removed += 1
        except OSError:  # in use, another user's, or swept by a neighbour
            continue
    return removed


def _sweep_once(place: str) -> None:
    with _SWEEPING:
        if place not in _swept:
            _swept.add(place)
            sweep(place)
