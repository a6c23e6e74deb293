"""Notices that a run stands still, collects the stacks of all ranks, and ends the attempt.

The training thread of a rank that stands still cannot be trusted to raise anything: it may sit in a collective, a
driver call or a read that never returns. So a thread beside it writes the stacks into the run folder, where the ranks
meet without a collective, and ends the process; whoever started it sees that and starts again.
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
from m2f.data_pipeline.printable import printable
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.recovery.ending import Ending, write_ending
from m2f.trainer.reporting import STALL_EXIT, Notice, Reporter
from m2f.trainer.telemetry.phases import Phase, PhaseClock
from m2f.trainer.telemetry.storage_waits import REQUEST_S, StorageWaits

GATHER_S = 15.0
"""How long the ranks wait for each other's stacks."""
STACKS = "stacks.txt"
LOOK_AT_STORAGE_S = 60.0
"""From when on a phase may take so long because the storage does not answer."""
LEAVE_S = 2.0
"""How long a report may take on its way out of the process."""
COMPILE_S = 1800.0
"""How much longer a phase of the first step may take where the model is compiled in it."""
WAITING_PLACES = (os.path.dirname(dist.__file__), f"deepspeed{os.sep}comm", Ranks.exchange.__code__.co_filename)
"""Parts of the paths of code in which a rank waits for others."""


@dataclass(frozen=True)
class RankStacks:
    """What one rank was doing when the run stood still."""

    rank: int
    host: str
    count: int
    """Of its `Mark`."""
    phase: Phase
    seconds: float
    """In this phase so far."""
    in_collective: bool
    """Whether it waits for other ranks."""
    place: str
    """Innermost line of the training thread."""
    stacks: str
    """Of all its threads."""


class Watchdog:
    """A thread that watches `clock`; a context manager around the steps, entered by the training thread.

    Where no new phase begins for `training.stall_timeout_s` (plus the upload's own limit while saving, and COMPILE_S in
    the first step of a compiled model), every rank leaves its stacks in `failures/stall-ATTEMPT/` of the run folder.
    The lowest rank that answers joins them, reports the notice `stalled`, and all end with STALL_EXIT. Where the
    interpreter itself is held up, faulthandler's own thread ends the process. Waiting for a
    storage that does not answer is no stall, see `StorageWaits`.
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
        self._storage = storage.impatient(REQUEST_S)
        self._waits = StorageWaits(job, storage, ranks, reporter)
        self._folder = join(job.run_folder, "failures", f"stall-{attempt}")
        self._limit_s = training.stall_timeout_s
        self._save_limit_s = training.stall_timeout_s + training.checkpoint.upload_timeout_s
        self._first_limit_s = training.stall_timeout_s + (COMPILE_S if training.compile else 0.0)
        self._look_s = min(5.0, self._limit_s / 10)
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
        with tempfile.TemporaryFile("w+") as last_words:
            while not self._closing.wait(self._look_s):
                mark = self._clock.mark
                limit_s = self._limit_of(mark.phase)
                # Fires only when this thread does not get to run, or hangs itself further down.
                faulthandler.dump_traceback_later(limit_s + 2 * GATHER_S, exit=True, file=sys.__stderr__ or last_words)
                seconds = time.monotonic() - mark.since
                # Well before the limit: an outage may end just then, and whoever waited for it has yet to ask again.
                looks = seconds > min(limit_s / 2, LOOK_AT_STORAGE_S)
                waits = looks and self._waits.look(self._in_collective(), seconds)
                if seconds > limit_s and not waits:
                    self._end()
            faulthandler.cancel_dump_traceback_later()

    def _limit_of(self, phase: Phase) -> float:
        if phase == "checkpoint":
            return self._save_limit_s
        return self._limit_s if self._clock.step else self._first_limit_s

    def _end(self) -> None:
        """Leave this rank's stacks, join those of all where it is this rank's turn, and end the process."""
        try:
            mine = self._look()
            self._storage.put(self._url(mine.rank), json.dumps(asdict(mine)).encode())
            found = self._gather()
            if min(stacks.rank for stacks in found) == mine.rank:
                self._tell(found)
            else:
                self._wait_until_told()
        except Exception:  # no store: what this rank knows is in its log
            traceback.print_exc()
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        finally:
            os._exit(STALL_EXIT)

    def _in_collective(self) -> bool:
        """Whether the training thread waits for other ranks."""
        training = sys._current_frames()[self._training_thread]
        return any(place in frame.f_code.co_filename for frame in _chain(training) for place in WAITING_PLACES)

    def _look(self) -> RankStacks:
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
        """The stacks of all ranks, or of those that have left theirs in time; in rank order."""
        deadline = time.monotonic() + GATHER_S
        urls = {self._url(rank) for rank in range(self._ranks.world_size)}
        while (there := urls & set(self._storage.list(self._folder))) != urls and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [RankStacks(**parse_json(self._storage.get(url))) for url in there]
        return sorted(found, key=lambda stacks: stacks.rank)

    def _tell(self, found: Sequence[RankStacks]) -> None:
        url = join(self._folder, STACKS)
        message = f"{describe_stall(found, self._ranks.world_size)}. Stacks of all ranks: {url}"
        if not self._ranks.is_first:  # whose reporter may have no voice
            sys.stderr.write(f"{printable(message)}\n")
        write_ending(self._storage, self._job.run_folder, self._job.attempt, Ending("stalled", message))
        self._reporter.report(Notice("stalled", self._clock.step, message))
        time.sleep(LEAVE_S)
        self._storage.put(url, join_stacks(message, found).encode())

    def _wait_until_told(self) -> None:
        """The attempt ends with the first process, so the others let the one that reports go ahead."""
        deadline = time.monotonic() + GATHER_S + 2 * LEAVE_S
        while not self._storage.exists(join(self._folder, STACKS)) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _url(self, rank: int) -> str:
        return join(self._folder, f"rank_{rank:04d}.json")


def describe_stall(found: Sequence[RankStacks], world_size: int) -> str:
    """Who holds the run up, and where. `found` has the ranks that answered.

    The ranks that got least far are to blame, among them those that do not wait for others; before all, ranks that did
    not answer, as their process is frozen or its interpreter held up.
    """
    silent = sorted(set(range(world_size)) - {stacks.rank for stacks in found})
    last = [stacks for stacks in found if stacks.count == min(s.count for s in found)]
    slow = [stacks for stacks in last if not stacks.in_collective] or last
    if silent:
        causes = [f"{_ranks(silent)} gave no sign of life"]
        waiting = [stacks.rank for stacks in found]
    else:
        causes = [f"rank {s.rank} on {s.host} has been in `{s.phase}` for {s.seconds:.0f} s at {s.place}" for s in slow]
        waiting = sorted({stacks.rank for stacks in found} - {stacks.rank for stacks in slow})
    rest = f"; {_ranks(waiting)} waited for it" if waiting else ""
    return f"the run stands still: {', '.join(causes)}{rest}"


def join_stacks(message: str, found: Sequence[RankStacks]) -> str:
    """One text with the threads of all ranks, the training thread first."""
    parts = [f"==== rank {s.rank} on {s.host}, in `{s.phase}` for {s.seconds:.0f} s ====\n{s.stacks}" for s in found]
    return "\n".join([message, "", *parts])


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers))}"


def _chain(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frame: FrameType) -> str:
    """`loader.py:88 in __next__: return queue.get()`."""
    inner = traceback.extract_stack(frame, limit=None)[-1]
    return f"{os.path.basename(inner.filename)}:{inner.lineno} in {inner.name}: {inner.line}"
