"""Journal file of entries to send: one writer appends, and reading resumes after the last committed entry.

Appended entries survive a crash of the process. Entries that were read but not committed are read again. If the disk
refuses an entry, the file is truncated to its previous length, so that the next entry is not corrupted.
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
    """Return the kind of an entry; None if another version wrote it or it is damaged."""
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
    """Journal of JSON lines in `path`. The file `path` + `.sent` stores the number of bytes that were already sent.

    The number is read again for every batch, because another process, such as a second `m2f eval` of the run, may have
    sent and removed the journal since.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal. Raises OSError if the folder of `path` cannot be created."""
        self.path = path
        self._position_file = path.with_name(path.name + ".sent")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, entry: Entry) -> None:
        """Append one entry. Raises OSError if the disk refuses it; the file is then unchanged."""
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._lock, self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # a writer was killed in the middle of a line
                line = b"\n" + line
            try:
                _write_whole(file, line)
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def read(self, limit: int) -> list[tuple[Entry, int]]:
        """Return up to `limit` uncommitted entries, each with the position to commit once it is sent."""
        if not self.path.exists():
            return []
        entries: list[tuple[Entry, int]] = []
        with self.path.open("rb") as file:
            file.seek(self._read_position())
            while len(entries) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):  # end of file, or a line that is being written
                    break
                entry = _parse(line)
                if entry is not None:
                    entries.append((entry, file.tell()))
        return entries

    def commit(self, position: int) -> None:
        """Record that everything before `position`, in bytes, has been sent."""
        partial = self._position_file.with_name(self._position_file.name + ".partial")
        partial.write_text(str(position))
        os.replace(partial, self._position_file)

    @property
    def refused(self) -> Path:
        """File of entries that can never be sent, kept for inspection."""
        return self.path.with_name(self.path.name + ".refused")

    def set_aside(self, entries: Sequence[Entry]) -> None:
        """Append entries to `refused`. Raises OSError if the file cannot be written."""
        with self.refused.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(entry, ensure_ascii=True)}\n" for entry in entries)

    def remove(self) -> None:
        """Delete the files: first the `.sent` file, so a crash in between can only resend entries, not skip any."""
        self._position_file.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _read_position(self) -> int:
        try:
            return min(max(0, int(self._position_file.read_text())), self.path.stat().st_size)
        except (OSError, ValueError):
            return 0


def _write_whole(file: BinaryIO, data: bytes) -> None:
    while data:  # a nearly full disk may accept only part of the data
        data = data[file.write(data) :]


def _parse(line: bytes) -> Entry | None:
    """Return the entry of a line; None for an incomplete line that a killed writer left."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
