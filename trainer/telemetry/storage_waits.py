"""Detect that a rank waits for the storage, so that no rank's watchdog mistakes this for a stall."""

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
"""Longest wait, in seconds, for one answer of the storage or of the shared counter."""
OUTAGE_GRACE_S = 60.0
"""Seconds after the last detection for which an outage is assumed to continue. A process that waits for the storage
sleeps up to 20 s between retries, and ranks that wait for that process check for an outage only occasionally."""
REPORT_INTERVAL_S = 60.0
"""Seconds between two reports of a rank that it is waiting."""
_COUNTER = "storage_waits"


class StorageWaits:
    """Detects, for one rank, waits that the storage causes. The rank's watchdog calls `is_storage_wait`.

    A rank that does not wait for others queries the storage. If the storage does not answer, the rank increments a
    counter that all ranks share, and reports the outage at most once a minute. A rank that waits for others checks
    whether the counter has changed.
    """

    def __init__(self, job: TrainJob, storage: Storage, ranks: Ranks, reporter: Reporter) -> None:
        urls = [url for url in (job.run_folder, *job.shards) if "://" in url]
        self._probe_urls = [join(url, "manifest.json") for url in dict.fromkeys(urls)]
        """Objects to query. They need not exist: any answer shows that the storage works."""
        self._storage = storage.without_retries(REQUEST_S)
        self._ranks, self._reporter = ranks, reporter
        self._last_count, self._outage_at = 0, float("-inf")  # monotonic time at which an outage was last detected
        self._reported_at = float("-inf")

    def is_storage_wait(self, waits_for_others: bool, seconds: float) -> bool:
        """Return whether this rank, or one that it waits for, has waited `seconds` because of the storage."""
        if not self._probe_urls:  # local files
            return False
        if self._others_report_outage() if waits_for_others else self._storage_is_down(seconds):
            self._outage_at = time.monotonic()
        return time.monotonic() - self._outage_at < OUTAGE_GRACE_S

    def _others_report_outage(self) -> bool:
        before = self._last_count
        self._last_count = _call_with_limit(lambda: self._ranks.count(_COUNTER), before)
        return before != self._last_count

    def _storage_is_down(self, seconds: float) -> bool:
        for url in self._probe_urls:
            try:
                self._storage.exists(url)
            except OutageError:
                _call_with_limit(lambda: self._ranks.count(_COUNTER, 1), 0)
                self._report(f"rank {self._ranks.rank} has been waiting for {seconds:.0f} s; {url} does not answer")
                return True
            except StorageError:  # a rejected request is an answer
                continue
        return False

    def _report(self, line: str) -> None:
        if time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = time.monotonic()
            self._reporter.report(Notice("storage", 0, line))


def _call_with_limit(function: Callable[[], T], default: T) -> T:
    """Return the result of `function`, or `default` after REQUEST_S: the process with the counter may be frozen."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(REQUEST_S)
    return results[0] if results else default
