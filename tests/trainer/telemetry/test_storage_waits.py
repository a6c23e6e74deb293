from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from m2f.data_pipeline.errors import AccessDeniedError, OutageError
from m2f.trainer.telemetry import storage_waits
from m2f.trainer.telemetry.storage_waits import StorageWaits

REMOTE = SimpleNamespace(run_folder="s3://bucket/run", shards=("s3://bucket/train",))


class FakeStorage:
    """Storage whose requests raise `error` while `is_down` is set."""

    is_down = False
    error = OutageError

    def without_retries(self, limit_s):
        assert limit_s <= 5.0
        return self

    def exists(self, url):
        if self.is_down:
            raise self.error(f"{url}: no answer")
        return False


@dataclass
class FakeRanks:
    """One rank, with counters shared by all ranks."""

    rank: int
    counters: Counter

    def count(self, name, increment=0):
        self.counters[name] += increment
        return self.counters[name]


@dataclass
class EventLog:
    lines: list = field(default_factory=list)

    def report(self, event):
        self.lines.append(event.message)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(storage_waits, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.fixture
def pair():
    """Storage waits of a rank whose storage goes down and of a rank waiting for it, then the storage and the events."""
    store, events, counters = FakeStorage(), EventLog(), Counter()
    waits = [StorageWaits(REMOTE, store, FakeRanks(rank, counters), events) for rank in (0, 1)]
    return (*waits, store, events)


def test_storage_outage_is_not_a_stall_and_is_reported_once_a_minute(pair, clock):
    disconnected, _, store, events = pair
    assert not disconnected.is_storage_wait(False, 70.0)
    store.is_down = True
    for _ in range(13):
        assert disconnected.is_storage_wait(False, 70.0)
        clock.seconds += 5.0
    assert events.lines == ["rank 0 has been waiting for 70 s; s3://bucket/run/manifest.json does not answer"] * 2


def test_rank_has_time_to_retry_after_the_storage_recovers(pair, clock):
    """The rank may still sleep before its next retry when an outage longer than `stall_timeout_s` ends."""
    disconnected, _, store, _ = pair
    store.is_down = True
    assert disconnected.is_storage_wait(False, 320.0)
    store.is_down = False
    clock.seconds += 25.0
    assert disconnected.is_storage_wait(False, 345.0)
    clock.seconds += 40.0
    assert not disconnected.is_storage_wait(False, 385.0)


def test_waiting_ranks_are_excused_while_the_outage_is_reported(pair, clock):
    disconnected, waiting, store, _ = pair
    assert not waiting.is_storage_wait(True, 70.0)
    store.is_down = True
    disconnected.is_storage_wait(False, 70.0)
    assert waiting.is_storage_wait(True, 70.0)
    clock.seconds += 40.0
    assert waiting.is_storage_wait(True, 110.0)
    clock.seconds += 40.0
    assert not waiting.is_storage_wait(True, 150.0)  # no rank has reported it for a minute
    disconnected.is_storage_wait(False, 150.0)
    assert waiting.is_storage_wait(True, 150.0)


def test_unresponsive_counter_excuses_no_rank(pair, clock, monkeypatch):
    _, waiting, _, _ = pair
    monkeypatch.setattr(storage_waits, "_call_with_limit", lambda function, default: default)
    assert not waiting.is_storage_wait(True, 70.0)


def test_local_files_never_excuse_a_rank(clock):
    store = FakeStorage()
    store.is_down = True
    local = SimpleNamespace(run_folder="runs/run", shards=("shards",))
    assert not StorageWaits(local, store, FakeRanks(0, Counter()), EventLog()).is_storage_wait(False, 70.0)


def test_rejected_request_counts_as_an_answer(pair, clock):
    disconnected, _, store, events = pair
    store.is_down, store.error = True, AccessDeniedError
    assert not disconnected.is_storage_wait(False, 70.0)
    assert events.lines == []
