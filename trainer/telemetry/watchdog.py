"""Detect a stalled run, collect the stacks of all ranks and end the attempt.

The training thread of a stalled rank may never raise an error: it may be stuck in a collective, a driver call or a
read. So a second thread writes the stacks to the run folder, which ranks reach without a collective, and ends the
process. The parent process notices the exit and restarts the ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType

import torch.distributed as dist

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.printable import print_line
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.recovery.ending import Ending, write_ending
from m2f.trainer.reporting import STALL_EXIT, Notice, Reporter
from m2f.trainer.telemetry.phases import Phase, PhaseClock
from m2f.trainer.telemetry.storage_waits import REQUEST_S, StorageWaits

GATHER_S = 15.0
"""Seconds that ranks wait for each other's stacks."""
STACKS = "stacks.txt"
STORAGE_CHECK_S = 60.0
"""Seconds in a phase after which the watchdog checks whether the storage is the cause."""
REPORT_GRACE_S = 2.0
"""Seconds that a report gets to be delivered before the process exits."""
COMPILE_S = 1800.0
"""Seconds added to the limit of phases in the first step if the model is compiled in it."""
COLLECTIVE_PATHS = (os.path.dirname(dist.__file__), f"deepspeed{os.sep}comm", Ranks.exchange.__code__.co_filename)
"""Path fragments of code in which a rank waits for other ranks."""


@dataclass(frozen=True)
class RankStacks:
    """State of one rank at the moment of the stall."""

    rank: int
    host: str
    count: int
    """`count` of its `Mark`: phases entered so far."""
    phase: Phase
    seconds: float
    """Time spent in this phase so far."""
    in_collective: bool
    """Whether the rank is waiting for other ranks."""
    place: str
    """Innermost line of the training thread."""
    stacks: str
    """Stacks of all its threads."""


class Watchdog:
    """Thread that watches `clock`; a context manager around the steps, entered by the training thread.

    A rank stalls if it spends more than `training.stall_timeout_s` in one phase. Saving gets the upload timeout in
    addition, and the first step of a compiled model gets COMPILE_S. After a stall every rank writes its stacks to
    `failures/stall-ATTEMPT/` in the run folder. The lowest rank that answers joins them and reports the notice
    `stalled`; all ranks end with STALL_EXIT. If the interpreter itself is blocked, the thread of faulthandler ends the
    process. Waiting for a storage that does not answer is not a stall, see `StorageWaits`.
    """

    def __init__(
        self,
        clock: PhaseClock,
        ranks: Ranks,
        storage: Storage,
        job: TrainJob,
        attempt: str,
        reporter: Reporter,
    ) -> None:
        training = job.training
        self._job = job
        self._clock, self._ranks, self._reporter = clock, ranks, reporter
        self._storage = storage.without_retries(REQUEST_S)
        self._storage_waits = StorageWaits(job, storage, ranks, reporter)
        self._folder = join(job.run_folder, "failures", f"stall-{attempt}")
        self._limit_s = training.stall_timeout_s
        self._save_limit_s = training.stall_timeout_s + training.checkpoint.upload_timeout_s
        self._first_limit_s = training.stall_timeout_s + (COMPILE_S if training.settled_compile else 0.0)
        self._poll_s = min(5.0, self._limit_s / 10)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._training_thread = threading.get_ident()

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._limit_s:
            self._thread.join()

    def _watch(self) -> None:
        with tempfile.TemporaryFile("w+") as crash_log:
            while not self._closing.wait(self._poll_s):
                mark = self._clock.mark
                limit_s = self._phase_limit_s(mark.phase)
                # Fires only if this thread does not get to run, or itself hangs in the code below.
                faulthandler.dump_traceback_later(limit_s + 2 * GATHER_S, exit=True, file=sys.__stderr__ or crash_log)
                seconds = time.monotonic() - mark.since
                # Check well before the limit: an outage may end just before it, when the waiting process has not
                # retried yet.
                is_check_due = seconds > min(limit_s / 2, STORAGE_CHECK_S)
                is_outage = is_check_due and self._storage_waits.is_storage_wait(self._in_collective(), seconds)
                if seconds > limit_s and not is_outage:
                    self._abort()
            faulthandler.cancel_dump_traceback_later()

    def _phase_limit_s(self, phase: Phase) -> float:
        if phase == "checkpoint":
            return self._save_limit_s
        return self._limit_s if self._clock.step else self._first_limit_s

    def _abort(self) -> None:
        """Write this rank's stacks and exit the process. The lowest rank that answers joins the stacks of all first."""
        try:
            own_stacks = self._capture_stacks()
            self._storage.put(self._url(own_stacks.rank), json.dumps(asdict(own_stacks)).encode())
            found = self._gather()
            if min(stacks.rank for stacks in found) == own_stacks.rank:
                self._report(found)
            else:
                self._wait_for_report()
        except Exception:  # no storage: this rank's stacks go to its log
            traceback.print_exc()
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        finally:
            os._exit(STALL_EXIT)

    def _in_collective(self) -> bool:
        """Return whether the training thread waits for other ranks."""
        training = sys._current_frames()[self._training_thread]
        return any(path in frame.f_code.co_filename for frame in _outer_frames(training) for path in COLLECTIVE_PATHS)

    def _capture_stacks(self) -> RankStacks:
        mark = self._clock.mark
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        threads = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sorted(frames.items(), key=lambda item: item[0] != self._training_thread)
            if ident != threading.get_ident()
        ]
        training = frames[self._training_thread]
        return RankStacks(
            rank=self._ranks.rank,
            host=socket.gethostname(),
            count=mark.count,
            phase=mark.phase,
            seconds=time.monotonic() - mark.since,
            in_collective=self._in_collective(),
            place=_describe(training),
            stacks="\n".join(threads),
        )

    def _gather(self) -> list[RankStacks]:
        """Return the stacks of all ranks in rank order, without ranks that did not write theirs within GATHER_S."""
        deadline = time.monotonic() + GATHER_S
        urls = {self._url(rank) for rank in range(self._ranks.world_size)}
        while (present := urls & set(self._storage.list(self._folder))) != urls and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [RankStacks(**parse_json(self._storage.get(url))) for url in present]
        return sorted(found, key=lambda stacks: stacks.rank)

    def _report(self, found: Sequence[RankStacks]) -> None:
        url = join(self._folder, STACKS)
        message = f"{describe_stall(found, self._ranks.world_size)}. Stacks of all ranks: {url}"
        if not self._ranks.is_first:  # the reporters of other ranks may print nothing
            print_line(sys.stderr, message)
        write_ending(self._storage, self._job.run_folder, self._job.attempt, Ending("stalled", message))
        self._reporter.report(Notice("stalled", self._clock.step, message))
        time.sleep(REPORT_GRACE_S)
        self._storage.put(url, join_stacks(message, found).encode())

    def _wait_for_report(self) -> None:
        """Wait for the rank that reports, because the attempt ends as soon as one process exits."""
        deadline = time.monotonic() + GATHER_S + 2 * REPORT_GRACE_S
        while not self._storage.exists(join(self._folder, STACKS)) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _url(self, rank: int) -> str:
        return join(self._folder, f"rank_{rank:04d}.json")


def describe_stall(found: Sequence[RankStacks], world_size: int) -> str:
    """Describe which ranks stall the run, and at which line. `found` holds the ranks that answered.

    Ranks that did not answer are the cause, as their process is frozen or their interpreter blocked. If all answered,
    the cause is the ranks that entered the fewest phases; among them, those that are not waiting for others.
    """
    silent = sorted(set(range(world_size)) - {stacks.rank for stacks in found})
    last = [stacks for stacks in found if stacks.count == min(s.count for s in found)]
    slow = [stacks for stacks in last if not stacks.in_collective] or last
    if silent:
        causes = [f"{_ranks(silent)} did not respond"]
        waiting = [stacks.rank for stacks in found]
    else:
        causes = [f"rank {s.rank} on {s.host} has been in `{s.phase}` for {s.seconds:.0f} s at {s.place}" for s in slow]
        waiting = sorted({stacks.rank for stacks in found} - {stacks.rank for stacks in slow})
    rest = f"; {_ranks(waiting)} waited" if waiting else ""
    return f"training stalled: {', '.join(causes)}{rest}"


def join_stacks(message: str, found: Sequence[RankStacks]) -> str:
    """Join the stacks of all ranks into one text, with the training thread of each rank first."""
    parts = [f"==== rank {s.rank} on {s.host}, in `{s.phase}` for {s.seconds:.0f} s ====\n{s.stacks}" for s in found]
    return "\n".join([message, "", *parts])


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers))}"


def _outer_frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frame: FrameType) -> str:
    """Return the innermost line, as in `loader.py:88 in __next__: return queue.get()`."""
    inner = traceback.extract_stack(frame, limit=None)[-1]
    return f"{os.path.basename(inner.filename)}:{inner.lineno} in {inner.name}: {inner.line}"
