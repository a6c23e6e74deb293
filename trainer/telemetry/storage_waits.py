"""A rank that waits for the storage does not stall the run: how the watchdogs of the ranks find out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from m2f.data_pipeline.errors import OutageError, StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.job import TrainJob
from m2f.trainer.ranks import Ranks
from m2f.trainer.reporting import Notice, Reporter

T = TypeVar("T")
REQUEST_S = 5.0
"""Longest wait for one answer of the storage or of the counter."""
FRESH_S = 60.0
"""How long the last word of an outage excuses a rank. Whoever waits sleeps up to 20 s before it asks again, and ranks
that wait for it hear of the outage from time to time only."""
SAY_S = 60.0
_COUNTER = "storage_waits"


class StorageWaits:
    """One rank's view; `look` is called by its watchdog.

    A rank that does not wait for others asks the storage. Where that does not answer, the rank says so once a minute
    and adds to a counter that all ranks share. A rank that waits for others looks whether the counter moves.
    """

    def __init__(self, job: TrainJob, storage: Storage, ranks: Ranks, reporter: Reporter) -> None:
        urls = [url for url in (job.run_folder, *job.shards) if "://" in url]
        self._objects = [join(url, "manifest.json") for url in dict.fromkeys(urls)]  # whether they exist is irrelevant
        self._storage = storage.impatient(REQUEST_S)
        self._ranks, self._reporter = ranks, reporter
        self._seen, self._away = 0, float("-inf")  # of the monotonic clock: when the storage was last said to be away
        self._said = float("-inf")

    def look(self, waits_for_others: bool, seconds: float) -> bool:
        """Whether the storage is why this rank, or one that it waits for, has been in its phase for `seconds`."""
        if not self._objects:  # local files
            return False
        if self._others_wait() if waits_for_others else self._storage_is_away(seconds):
            self._away = time.monotonic()
        return time.monotonic() - self._away < FRESH_S

    def _others_wait(self) -> bool:
        before, self._seen = self._seen, _answer(lambda: self._ranks.count(_COUNTER), self._seen)
        return before != self._seen

    def _storage_is_away(self, seconds: float) -> bool:
        for url in self._objects:
            try:
                self._storage.exists(url)
            except OutageError:
                _answer(lambda: self._ranks.count(_COUNTER, 1), 0)
                self._say(f"rank {self._ranks.rank} has been waiting for {seconds:.0f} s; {url} does not answer")
                return True
            except StorageError:  # a refusal is an answer
                continue
        return False

    def _say(self, line: str) -> None:
        if time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            self._reporter.report(Notice("storage", 0, line))


def _answer(ask: Callable[[], T], otherwise: T) -> T:
    """What `ask` returns within REQUEST_S: the process that keeps the counter may be frozen."""
    answers: list[T] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(REQUEST_S)
    return answers[0] if answers else otherwise
