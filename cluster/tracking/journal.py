"""A file of entries that wait to be sent: appended by one writer, read from where the last commit stopped.

What is appended survives the death of the process; entries that were read but not committed are read again. An entry
that the disk refuses leaves nothing behind, so that the next one is whole.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from m2f.data_pipeline.documents import parse_json

Entry = dict[str, Any]
"""One JSON object."""
Kind = Literal["metrics", "artifact", "tag", "status", "evaluation", "kept"]


def kind_of(entry: Entry) -> Kind | None:
    """What is to be sent; None for an entry that another version wrote or that somebody damaged."""
    match entry:
        case {"metrics": dict() as values, "step": int(), "time_ms": int()}:
            return "metrics" if all(isinstance(value, int | float) for value in values.values()) else None
        case {"evaluation": {"commit": str(), "step": int()}, "sets": list(), "time_ms": int(), "replaces": bool()}:
            return "evaluation"
        case {"kept": list(), "newest": int()}:
            return "kept"
        case {"artifact": str(), "folder": str()}:
            return "artifact"
        case {"tag": str(), "value": str()}:
            return "tag"
        case {"status": "RUNNING" | "FINISHED" | "FAILED" | "KILLED"}:
            return "status"
    return None


class Journal:
    """JSON lines in `path`; the number of bytes already sent is kept beside it in `path` + `.sent`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where its folder cannot be made."""
        self.path = path
        self._mark = path.with_name(path.name + ".sent")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sent = self._read_mark()

    def append(self, entry: Entry) -> None:
        """Add one entry. Raises OSError where the disk refuses it; the file is then as before."""
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._lock, self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # a writer was killed within a line
                line = b"\n" + line
            try:
                _write_whole(file, line)
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

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

    @property
    def refused(self) -> Path:
        """File of the entries that can never be sent, for a person to look at."""
        return self.path.with_name(self.path.name + ".refused")

    def set_aside(self, entries: Sequence[Entry]) -> None:
        """Keep entries in `refused`. Raises OSError."""
        with self.refused.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(entry, ensure_ascii=True)}\n" for entry in entries)

    def remove(self) -> None:
        """Delete the files. The mark goes first: a crash in between replays entries rather than skips them."""
        self._mark.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self._sent = 0

    def _read_mark(self) -> int:
        try:
            return min(max(0, int(self._mark.read_text())), self.path.stat().st_size)
        except (OSError, ValueError):
            return 0


def _write_whole(file: BinaryIO, data: bytes) -> None:
    while data:  # a disk that is nearly full takes a part first
        data = data[file.write(data) :]


def _parse(line: bytes) -> Entry | None:
    """The entry, or None for the half line that a killed writer left."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
