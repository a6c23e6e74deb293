"""Stored queue of a run's evaluations, with the status of each."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.errors import EvaluationError
from m2f.trainer.checkpoint.commits import Commit, CommitList

Status = Literal["waiting", "running", "published", "failed", "dropped", "withdrawn"]
WITHDRAWN = "the run went back behind this checkpoint"


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint and the status of its evaluation."""

    step: int
    checkpoint: str
    """Folder or URL of the checkpoint."""
    queued_ms: int
    """Unix time in milliseconds; orders the entries of a step."""
    status: Status = "waiting"
    detail: str = ""
    """Reason why the evaluation failed, was dropped or was withdrawn."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Headline metrics by name, such as `val/PQ`; empty until they are published."""
    commit: str = ""
    """Name of the commit; empty in entries of version 0.1."""
    starts: int = 0
    """Number of starts of the evaluation since the driver's start, without those that an outage ended; 0 if settled."""

    @property
    def key(self) -> str:
        """Unique key of the entry. The step is not unique: a step has two entries if it is committed again."""
        return self.commit or f"{self.step}"

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder."""
        return self.checkpoint.rstrip("/").rpartition("/")[2]

    @property
    def settled(self) -> bool:
        """Whether the evaluation is neither waiting nor running."""
        return self.status not in ("waiting", "running")


def queue_url(config: RunConfig) -> str:
    """Return the path or URL of the queue file of a run."""
    return join(config.run_folder, "evaluations", "queue.json")


def evaluation_folder(step: int) -> str:
    """Return the folder of an evaluation's files, relative to the run folder."""
    return f"evaluations/step_{step:08d}"


def read_results(config: RunConfig, storage: Storage, step: int, label: str) -> Any:
    """Return the content of results.json of a step and set; None if the file does not exist or is damaged."""
    url = join(config.run_folder, evaluation_folder(step), label, "results.json")
    data = storage.get(url) if storage.exists(url) else None
    try:
        return None if data is None else parse_json(data)
    except DocumentError:
        return None


class EvaluationQueue:
    """Queue of evaluations in one JSON file, which is written after every change.

    Only one process may write the file; its threads may share the queue. An entry that was running when its process
    died becomes waiting again. A damaged file is rebuilt at the start of a run, see `rebuild`.
    """

    def __init__(self, storage: Storage, url: str, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before every write. If it raises, nothing is written."""
        self._check = check
        self._storage = storage
        self._url = url
        self._lock = threading.Lock()
        stored = (replace(e, status="waiting") if e.status == "running" else e for e in read_entries(storage, url))
        self._entries = {entry.key: entry for entry in stored}

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries in ascending order of their steps."""
        with self._lock:
            return _ordered(self._entries.values())

    def update(self, found: CommitList) -> tuple[Entry, ...]:
        """Queue new commits, and return the entries that changed because their commits were withdrawn.

        A waiting entry whose commit no longer exists is dropped. A published entry of a withdrawn commit is marked as
        withdrawn.
        """
        with self._lock:
            changed = [
                entry for commit in found.commits if (entry := self._entry_of(commit)) != self._entries.get(entry.key)
            ]
            names = {commit.name for commit in found.commits}
            entries = [entry for entry in self._entries.values() if entry.commit]
            waiting = [e for e in entries if e.status == "waiting" and e.commit not in names]
            published = [e for e in entries if e.status == "published" and e.commit in found.withdrawn]
            marked = [replace(entry, status="dropped", detail=WITHDRAWN) for entry in waiting]
            marked += [replace(entry, status="withdrawn", detail=WITHDRAWN) for entry in published]
            if changed or marked:
                self._store(*changed, *marked)
            return tuple(marked)

    def replaces(self, entry: Entry) -> bool:
        """Return whether results of the same step were already published for a commit that was withdrawn."""
        with self._lock:
            return any(e.step == entry.step and e.status == "withdrawn" for e in self._entries.values())

    def take(self, policy: Literal["every", "latest"]) -> tuple[Entry | None, tuple[Entry, ...]]:
        """Mark the next waiting entry as running. Return it (None if none waits) and the entries that are dropped.

        `every` takes the oldest entry; `latest` takes the newest and drops the others.
        """
        with self._lock:
            by_step = {e.step: e for e in _ordered(self._entries.values()) if e.status == "waiting"}
            if not by_step:
                return None, ()
            waiting = list(by_step.values())
            chosen, left_out = (waiting[-1], waiting[:-1]) if policy == "latest" else (waiting[0], [])
            dropped = [replace(e, status="dropped", detail="a newer checkpoint was waiting") for e in left_out]
            taken = replace(chosen, status="running", starts=chosen.starts + 1)
            self._store(taken, *dropped)
            return taken, tuple(dropped)

    def requeue_running(self) -> None:
        """Make running entries wait again after an outage, as if they had not been started.

        Nothing is stored, because a stored `running` is read as waiting.
        """
        with self._lock:
            for entry in tuple(self._entries.values()):
                if entry.status == "running":
                    self._entries[entry.key] = replace(entry, status="waiting", starts=entry.starts - 1)

    def reset_starts(self) -> None:
        """Forget the starts of all evaluations. Each driver calls it first, so that ends of drivers do not count."""
        with self._lock:
            if started := [replace(entry, starts=0) for entry in self._entries.values() if entry.starts]:
                self._store(*started)

    def publish(self, entry: Entry, metrics: Mapping[str, float]) -> None:
        """Mark an entry as published, with its metrics."""
        self._settle(replace(entry, status="published", metrics=dict(metrics)))

    def fail(self, entry: Entry, reason: str) -> None:
        """Mark an entry as failed, with the reason."""
        self._settle(replace(entry, status="failed", detail=reason))

    def _entry_of(self, commit: Commit) -> Entry:
        """Return the entry of a commit with its current URL: a known one, one of version 0.1, or a new one."""
        step, url = commit.checkpoint.step, commit.checkpoint.url
        known = self._entries.get(commit.name)
        if known is not None and known.detail == WITHDRAWN:  # the same bytes were committed again: undo the withdrawal
            status: Status = "published" if known.status == "withdrawn" else "waiting"
            return replace(known, checkpoint=url, status=status, detail="")
        if known is not None:
            return known
        old = self._entries.get(f"{step}")
        if old is not None and old.folder == commit.checkpoint.name:
            return replace(old, commit=commit.name, checkpoint=url)
        return Entry(step, url, int(time.time() * 1000), commit=commit.name)

    def _settle(self, entry: Entry) -> None:
        with self._lock:
            self._store(replace(entry, starts=0))

    def _store(self, *changed: Entry) -> None:
        """Store changed entries, first in the file and then in memory, so that a failed write changes nothing."""
        entries = {**self._entries, **{entry.key: entry for entry in changed}}
        for entry in changed:
            if entry.commit and (old := entries.get(f"{entry.step}")) and old.folder == entry.folder:
                del entries[f"{entry.step}"]
        rows = [asdict(entry) for entry in _ordered(entries.values())]
        self._check()
        self._storage.put(self._url, json.dumps(rows, indent=1).encode())
        self._entries = entries


def _ordered(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.step, entry.queued_ms)))


def read_entries(storage: Storage, url: str) -> tuple[Entry, ...]:
    """Read the stored entries in the order of the file, which is by step; none if the file does not exist.

    The checkpoints are those of the run folder that contains the file, which may have been moved or copied since.
    Raises EvaluationError if the file is damaged.
    """
    if not storage.exists(url):
        return ()
    data = storage.get(url)
    run_folder = url.rsplit("/", 2)[0]
    try:
        entries = [_read_row(row) for row in parse_json(data)]
        return tuple(replace(entry, checkpoint=join(run_folder, "checkpoints", entry.folder)) for entry in entries)
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{url} is not a valid evaluation queue ({error}); `m2f train` rebuilds it from the results"
        ) from error


def _read_row(row: Any) -> Entry:
    entry = Entry(**row)
    numbers = (entry.step, entry.queued_ms, entry.starts, *entry.metrics.values())
    texts = (entry.checkpoint, entry.detail, entry.commit)
    if entry.status not in get_args(Status) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"invalid entry: {row!r:.80}")
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError(f"entry with an invalid number: {row!r:.80}")
    return entry
