"""The stored queue and ledger of a run's evaluations: what waits, runs, was published, failed or dropped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from m2f.cluster.evaluation.choice import choose
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError

Status = Literal["waiting", "running", "published", "failed", "dropped"]


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint and what became of its evaluation."""

    step: int
    checkpoint: str
    """Folder or URL of the checkpoint."""
    queued_ms: int
    """Unix time. Metrics carry it, so that publishing twice leaves one point in MLflow."""
    status: Status = "waiting"
    detail: str = ""
    """Why it failed or was dropped."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Headline numbers, once published."""

    @property
    def settled(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("published", "failed", "dropped")


class EvaluationQueue:
    """Entries by step in one JSON object, written after every change. One process writes it; its threads may share it.

    An entry that was running when its process died waits again.
    """

    def __init__(self, storage: Storage, url: str, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before every write; what it raises is raised instead."""
        self._check = check
        self._storage = storage
        self._url = url
        self._lock = threading.Lock()
        self._entries = {e.step: e for e in read_entries(storage, url)}
        self.put_back()

    def entries(self) -> tuple[Entry, ...]:
        """All entries by ascending step."""
        with self._lock:
            return tuple(self._entries[step] for step in sorted(self._entries))

    def add(self, step: int, checkpoint: str) -> bool:
        """Queue a checkpoint; False if its step is known already."""
        with self._lock:
            if step in self._entries:
                return False
            self._store(Entry(step, checkpoint, int(time.time() * 1000)))
            return True

    def take(self, policy: Literal["every", "latest"]) -> tuple[Entry | None, tuple[Entry, ...]]:
        """Mark the next waiting entry as running and return it, with those that the policy drops."""
        with self._lock:
            choice = choose([e.step for e in self._entries.values() if e.status == "waiting"], policy)
            if choice.next is None:
                return None, ()
            reason = "a newer one was waiting"
            dropped = [replace(self._entries[step], status="dropped", detail=reason) for step in choice.dropped]
            taken = replace(self._entries[choice.next], status="running")
            self._store(taken, *dropped)
            return taken, tuple(dropped)

    def put_back(self) -> None:
        """What was taken and not settled waits again; needs no storage, as a stored `running` means the same."""
        with self._lock:
            for entry in tuple(self._entries.values()):
                if entry.status == "running":
                    self._entries[entry.step] = replace(entry, status="waiting")

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Enter that an evaluation's results are published."""
        self._settle(replace(self._entries[step], status="published", metrics=dict(metrics)))

    def fail(self, step: int, reason: str) -> None:
        """Enter that an evaluation failed."""
        self._settle(replace(self._entries[step], status="failed", detail=reason))

    def _settle(self, entry: Entry) -> None:
        with self._lock:
            self._store(entry)

    def _store(self, *changed: Entry) -> None:
        """Write first, believe after: a change that the storage refuses has not happened."""
        entries = {**self._entries, **{entry.step: entry for entry in changed}}
        rows = [asdict(entries[step]) for step in sorted(entries)]
        self._check()
        self._storage.put(self._url, json.dumps(rows, indent=1).encode())
        self._entries = entries


def read_entries(storage: Storage, url: str) -> tuple[Entry, ...]:
    """The entries that a queue wrote, by ascending step; none where it does not exist."""
    if not storage.exists(url):
        return ()
    try:
        return tuple(Entry(**row) for row in json.loads(storage.get(url)))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{url}: not a queue of evaluations ({error}); delete it to evaluate again") from error
