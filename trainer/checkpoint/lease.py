"""Take and hold the lease of a run folder: one writer at a time, on local disks and in S3.

A contender relies on its own clock and on successful reads. If the holder's beat changes, the holder is alive and the
contender is refused. The contender takes the next number if the holder provably ended, or if the beat stays unchanged
for `Timing.unchanged_s` during which the store answers. Time in which the store does not answer is not counted.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from m2f.data_pipeline.errors import MissingObjectError, ObjectExistsError, StorageError
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import list_checkpoints
from m2f.trainer.checkpoint.lease_record import (
    LeaseRecord,
    check_lease,
    newest_number,
    read_record,
    record_url,
    this_process,
)
from m2f.trainer.errors import LeaseHeldError, LeaseLostError

LEASE_VARIABLE = "M2F_LEASE"
"""Environment variable that passes a parent's lease to a driver: NUMBER:NONCE."""
_THREAD_LIMIT_S = 10.0
"""Time limit in seconds of one request by the thread that renews the lease. The thread repeats failed requests."""


@dataclass(frozen=True)
class Timing:
    """Intervals in seconds; tests use shorter ones."""

    renew_s: float = 2.0
    poll_s: float = 0.5
    unchanged_s: float = 30.0
    """Time for which a beat may stay unchanged, while the store answers, before its holder counts as dead."""


class Lease:
    """A lease that this process, or its parent, holds and renews."""

    def __init__(self, storage: Storage, run_folder: str, record: LeaseRecord, timing: Timing, renews: bool) -> None:
        self._storage, self._run_folder, self._record, self._timing = storage, run_folder, record, timing
        self._storage_without_retries = storage.without_retries(_THREAD_LIMIT_S)
        self._renews = renews
        self._lost: LeaseLostError | None = None
        self._closing = threading.Event()
        self._beats = 0
        if renews:
            self._write_beat(storage)
        self._thread = threading.Thread(target=self._renew_until_closed, name="lease", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """Number of the lease, passed on with the job."""
        return self._record.number

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a child process uses this lease."""
        return {LEASE_VARIABLE: f"{self._record.number}:{self._record.nonce}"}

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError if the thread has found a newer lease; sends no request."""
        if self._lost is not None:
            raise self._lost

    def check(self) -> None:
        """Query the store. Raises LeaseLostError if there is a newer lease."""
        self.raise_if_lost()
        check_lease(self._storage, self._run_folder, self.number)

    def close(self) -> None:
        """End the thread, and release the lease so that the next contender can take over immediately."""
        self._closing.set()
        self._thread.join()
        if self._renews and self._lost is None:
            with suppress(StorageError):  # without the release, the next contender waits until the beat is old
                self._storage.put(f"{record_url(self._run_folder, self.number)}.released", b"")

    def _renew_until_closed(self) -> None:
        while not self._closing.wait(self._timing.renew_s):
            try:
                check_lease(self._storage_without_retries, self._run_folder, self.number)
                if self._renews:
                    self._write_beat(self._storage_without_retries)
            except LeaseLostError as error:
                self._lost = error
                return
            except StorageError:  # an outage does not lose the lease: retry
                continue

    def _write_beat(self, storage: Storage) -> None:
        self._beats += 1
        storage.put(f"{record_url(self._run_folder, self.number)}.beat", f"{self._beats}".encode())


@contextmanager
def hold_lease(
    storage: Storage, run_folder: str, report: Callable[[str], None] = lambda line: None, timing: Timing | None = None
) -> Iterator[Lease]:
    """Hold the lease of a run folder during the block. Call it before Ray starts and before any other write.

    A process whose parent holds the lease (`Lease.environment`) uses that one. `report` receives messages about delays.

    Raises:
        LeaseHeldError: another process trains in this folder.
        StorageError: the store does not answer.
    """
    timing = timing or Timing()
    inherited = os.environ.get(LEASE_VARIABLE, "")
    record = _inherited_record(storage, run_folder, inherited) if inherited else None
    renews = record is None
    lease = Lease(storage, run_folder, record or acquire_lease(storage, run_folder, report, timing), timing, renews)
    try:
        yield lease
    finally:
        lease.close()


def acquire_lease(storage: Storage, run_folder: str, report: Callable[[str], None], timing: Timing) -> LeaseRecord:
    """Take the next lease of a run folder. If it is unclear whether the current holder is alive, wait to find out.

    Raises LeaseHeldError if the holder is alive.
    """
    while True:
        number = newest_number(storage, run_folder)
        if number:
            _wait_for_holder(storage, run_folder, number, report, timing)
        found = tuple(checkpoint.name for checkpoint in list_checkpoints(storage, run_folder))
        record = LeaseRecord(number + 1, uuid.uuid4().hex, this_process(), found)
        try:
            storage.put(record_url(run_folder, record.number), record.to_json(), if_absent=True)
        except ObjectExistsError:  # another contender was faster: wait for it in the next round
            continue
        return record


def _wait_for_holder(
    storage: Storage, run_folder: str, number: int, report: Callable[[str], None], timing: Timing
) -> None:
    """Return once the holder of a lease has ended or counts as dead. Raises LeaseHeldError if its beat changes."""
    address = record_url(run_folder, number)
    holder = read_record(storage, run_folder, number).holder
    first: bytes | None = None
    unchanged, last_read, reported = 0.0, None, False
    while True:
        try:
            if storage.exists(f"{address}.released") or holder.is_dead():
                return
            beat = _read_beat(storage, f"{address}.beat")
        except StorageError as error:
            report(f"{run_folder}: waiting for the storage to check whether {holder} is still training here ({error})")
            unchanged, last_read = 0.0, None
            time.sleep(timing.poll_s)
            continue
        now = time.monotonic()
        if last_read is None:
            first = beat if first is None else first
        else:  # capped, because a slow store also delays the holder's beats
            unchanged += min(now - last_read, 2 * timing.poll_s)
        last_read = now
        if beat != first:
            raise LeaseHeldError(
                f"{run_folder}: {holder} is training in this folder (lease {number}); wait until it ends, stop it, or "
                "choose another name"
            )
        if unchanged >= timing.unchanged_s:
            return
        if not reported and unchanged > 2 * timing.renew_s:
            report(f"{run_folder}: waiting {timing.unchanged_s:.0f} s for {holder} to renew lease {number}")
            reported = True
        time.sleep(timing.poll_s)


def _read_beat(storage: Storage, url: str) -> bytes:
    try:
        return storage.get(url)
    except MissingObjectError:  # the holder died before its first beat, or has yet to write it
        return b""


def _inherited_record(storage: Storage, run_folder: str, inherited: str) -> LeaseRecord | None:
    """Return the parent's lease if it belongs to this run folder; else None, and this process takes its own."""
    number, _, nonce = inherited.partition(":")
    with suppress(MissingObjectError):
        record = read_record(storage, run_folder, int(number))
        if record.nonce == nonce:
            check_lease(storage, run_folder, record.number)
            return record
    return None
