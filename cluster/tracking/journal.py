"""A file of entries that wait to be sent: appended by one writer, read from where the last commit stopped.

What is appended survives the death of the process; entries that were read but not committed are read again.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
"""One JSON object."""


class Journal:
    """JSON lines in `path`; the number of bytes already sent is kept beside it in `path` + `.sent`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = path.with_name(path.name + ".sent")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sent = self._read_mark()
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:  # a writer was killed within a line; the next entry starts a new one
                file.write(b"\n")

    def append(self, entry: Entry) -> None:
        """Add one entry. Raises OSError where the disk refuses it."""
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line)

    def read(self, limit: int) -> list[tuple[Entry, int]]:
        """Up to `limit` entries that are not committed, each with the position to commit once it is sent."""
        if not self.path.exists():
            return []
        entries: list[tuple[Entry, int]] = []
        with self.path.open("rb") as file:
            file.seek(self._sent)
            while len(entries) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):  # the end, or a line that is being written
                    break
                entry = _parse(line)
                if entry is not None:
                    entries.append((entry, file.tell()))
        return entries

    def commit(self, position: int) -> None:
        """Everything before `position` is sent."""
        partial = self._mark.with_name(self._mark.name + ".partial")
        partial.write_text(str(position))
        os.replace(partial, self._mark)
        self._sent = position

    def remove(self) -> None:
        """Delete the files. The mark goes first: a crash in between replays entries rather than skips them."""
        self._mark.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self._sent = 0

    def _read_mark(self) -> int:
        try:
            return min(int(self._mark.read_text()), self.path.stat().st_size)
        except (OSError, ValueError):
            return 0


def _parse(line: bytes) -> Entry | None:
    """The entry, or None for the half line that a killed writer left."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
