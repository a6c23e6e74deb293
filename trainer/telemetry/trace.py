"""Trace with one line of JSON per step and rank, for diagnosing a problem afterwards.

On a local disk, each line is appended to the run folder with one call, so a killed process loses none. Objects in an
object store cannot grow, so there the file is kept locally and uploaded every minute and at the end. Every attempt has
its own files. Their size is bounded: when two files are full, the older one is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join

LOGGER = logging.getLogger(__name__)
MAX_BYTES = 16_000_000
"""Size limit of one file. The previous file is kept in addition."""
UPLOAD_S = 60.0
"""Seconds between two copies to the run folder. A machine that is lost takes at most this part of the trace with it."""


class Trace:
    """Trace of one rank. `write` never raises; `close` does the last upload."""

    def __init__(self, storage: Storage, run_folder: str, attempt: str, rank: int, max_bytes: int = MAX_BYTES) -> None:
        self._storage, self._max_bytes = storage, max_bytes
        self._url = join(run_folder, "traces", attempt, f"rank_{rank:04d}.jsonl")
        self._is_remote = "://" in self._url
        self._scratch = ScratchFolder("trace") if self._is_remote else None
        folder = Path(self._url).parent if self._scratch is None else self._scratch.path
        self._path = folder / Path(self._url).name
        self._closing = threading.Event()
        self._broken = False
        self._uploaded: dict[Path, tuple[int, int]] = {}
        """Size in bytes and modification time in nanoseconds of each file at its last upload."""
        self._file: int | None = None
        self._uploader = threading.Thread(target=self._upload_periodically, name="trace", daemon=True)
        if self._is_remote:
            self._uploader.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line that starts with `time`. If the disk rejects it, log one warning and stop tracing."""
        if self._broken:
            return
        line = json.dumps({"time": round(time.time(), 3), **record}).encode() + b"\n"
        try:
            if self._file is None:
                self._file = self._open()
            os.write(self._file, line)
            if os.fstat(self._file).st_size > self._max_bytes:
                self._close_file()
                self._path.replace(_previous_file(self._path))
        except OSError as error:
            self._broken = True
            LOGGER.warning(f"tracing stopped: {self._path} cannot be written ({error})")

    def close(self) -> None:
        """Close the file. With a remote run folder, upload it."""
        self._closing.set()
        if self._is_remote:
            self._uploader.join()
        with contextlib.suppress(OSError):
            self._close_file()
        if self._scratch is not None:
            self._scratch.remove()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _upload_periodically(self) -> None:
        while not self._closing.wait(UPLOAD_S):
            self._upload()
        self._upload()

    def _upload(self) -> None:
        for path in (_previous_file(self._path), self._path):
            try:
                if not path.exists():
                    continue
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._uploaded.get(path) != version:  # the previous file no longer grows
                    self._storage.put_file(join(self._url.rpartition("/")[0], path.name), path)
                    self._uploaded[path] = version
            except (StorageError, OSError) as error:  # a failed trace must not fail the run
                LOGGER.warning(f"trace {path.name} cannot be uploaded: {error}")


def _previous_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.1{path.suffix}")
