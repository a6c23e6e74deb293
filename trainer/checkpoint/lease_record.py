"""Numbered leases of a run folder: which process may write to it, and which checkpoints each holder found.

<run folder>/lease/
    000003            record of lease 3: its holder and the checkpoints that it found; written once, if absent
    000003.beat       renewed by the holder every few seconds
    000003.released   the holder has ended its work

A lease is never revoked: it is outdated as soon as a higher number exists. Everything that changes the folder checks
its number first. Checkpoint folders carry the number, so late writes of an outdated holder are harmless and ignored.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.errors import CheckpointError, LeaseLostError

_RECORD = re.compile(r"/lease/(\d{6,})$")
_UNKNOWN = ""


@dataclass(frozen=True)
class Holder:
    """A process, identified so that another process on the same machine can tell whether it still runs."""

    host: str
    pid: int
    boot: str = _UNKNOWN
    """Boot id of the machine; empty if the system has none."""
    namespace: str = _UNKNOWN
    """Pid namespace of the process. In another namespace, the same pid is another process."""
    started: str = _UNKNOWN
    """Start time of the process in clock ticks after boot, because pids are reused."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_dead(self) -> bool:
        """Return whether it provably ended: same machine and namespace, but no process with its pid and start time."""
        current = this_process()
        if _UNKNOWN in (self.boot, self.namespace, self.started):
            return False
        if (self.boot, self.namespace) != (current.boot, current.namespace):
            return False
        return _start_time(self.pid) != self.started


@dataclass(frozen=True)
class LeaseRecord:
    """Content of the stored record of a lease."""

    number: int
    nonce: str
    """Random value that distinguishes a repeated write by one contender from a write by another."""
    holder: Holder
    found: tuple[str, ...]
    """Names of the checkpoint folders that were committed when the lease was taken."""

    def to_json(self) -> bytes:
        """Return the content of the record."""
        return json.dumps(asdict(self), indent=1).encode()


def this_process() -> Holder:
    """Describe the current process."""
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        pid=pid,
        boot=_read_text(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_read_link(Path("/proc/self/ns/pid")),
        started=_start_time(pid),
    )


def record_url(run_folder: str, number: int) -> str:
    """Return the URL of a lease's record."""
    return join(run_folder, "lease", f"{number:06d}")


def newest_number(storage: Storage, run_folder: str) -> int:
    """Return the number of the newest lease; 0 if the folder never had one."""
    matches = [_RECORD.search(url) for url in storage.list(join(run_folder, "lease"))]
    return max((int(match[1]) for match in matches if match), default=0)


def read_record(storage: Storage, run_folder: str, number: int) -> LeaseRecord:
    """Return the record of a lease. Raises CheckpointError if it is unreadable, MissingObjectError if there is none."""
    url = record_url(run_folder, number)
    data = storage.get(url)
    try:
        content = parse_json(data)
        holder = Holder(**content["holder"])
        return LeaseRecord(content["number"], content["nonce"], holder, tuple(content["found"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{url} cannot be read ({error}); if no process is training in this run folder, delete its lease/ folder"
        ) from error


def check_lease(storage: Storage, run_folder: str, number: int) -> None:
    """Raise LeaseLostError if a lease newer than `number` exists; 0 stands for a run without a lease."""
    if number and storage.exists(record_url(run_folder, number + 1)):
        holder = read_record(storage, run_folder, number + 1).holder
        raise LeaseLostError(
            f"{run_folder}: {holder} took over this run with lease {number + 1}, because the holder of lease {number} "
            "did not renew it; this process exits without further changes to the folder"
        )


def accepted_names(storage: Storage, run_folder: str, newest: int, number: int, names: Sequence[str]) -> frozenset[str]:
    """Return those `names` of checkpoint folders, written under lease `number`, that are valid under lease `newest`.

    A commit is valid if its lease is the newest one, or if the holder of the next lease found it.
    """
    if number >= newest:
        return frozenset(names)
    return frozenset(names) & frozenset(read_record(storage, run_folder, number + 1).found)


def _start_time(pid: int) -> str:
    """Return the start time in clock ticks after boot; empty if there is no such process or it is a zombie."""
    stat = _read_text(Path(f"/proc/{pid}/stat"))
    fields = stat.rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else _UNKNOWN


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return _UNKNOWN


def _read_link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return _UNKNOWN
