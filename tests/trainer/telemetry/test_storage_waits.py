from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from m2f.data_pipeline.errors import AccessDeniedError, OutageError
from m2f.trainer.telemetry import storage_waits
from m2f.trainer.telemetry.storage_waits import StorageWaits

REMOTE = SimpleNamespace(run_folder="s3://bucket/run", shards=("s3://bucket/train",))


class Store:
    """Store that does not answer while `away` is set."""

    away = False
    error = OutageError

    def impatient(self, limit_s):
        assert limit_s <= 5.0
        return self

    def exists(self, url):
        if self.away:
            raise self.error(f"{url}: no answer")
        return False


@dataclass
class RankOf:
    """A rank whose counters are those of its peers, too."""

    rank: int
    counters: Counter

    def count(self, name, increment=0):
        self.counters[name] += increment
        return self.counters[name]


@dataclass
class Events:
    lines: list = field(default_factory=list)

    def report(self, event):
        self.lines.append(event.message)


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(storage_waits, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.fixture
def pair():
    """A rank whose store goes away, the one that waits for it, the store and the events."""
    store, events, counters = Store(), Events(), Counter()
    waits = [StorageWaits(REMOTE, store, RankOf(rank, counters), events) for rank in (0, 1)]
    return (*waits, store, events)


def test_storage_outage_is_not_a_stall_and_is_reported_once_a_minute(pair, now):
    cut_off, _, store, events = pair
    assert not cut_off.is_storage_wait(False, 70.0)
    store.away = True
    for _ in range(13):
        assert cut_off.is_storage_wait(False, 70.0)
        now.seconds += 5.0
    assert events.lines == ["rank 0 has been waiting for 70 s; s3://bucket/run/manifest.json does not answer"] * 2


def test_rank_has_time_to_retry_after_the_storage_recovers(pair, now):
    """An outage that is longer than `stall_timeout_s` ends: the rank may sleep before its next attempt."""
    cut_off, _, store, _ = pair
    store.away = True
    assert cut_off.is_storage_wait(False, 320.0)
    store.away = False
    now.seconds += 25.0
    assert cut_off.is_storage_wait(False, 345.0)
    now.seconds += 40.0
    assert not cut_off.is_storage_wait(False, 385.0)


def test_waiting_ranks_are_excused_while_the_outage_is_reported(pair, now):
    cut_off, waiting, store, _ = pair
    assert not waiting.is_storage_wait(True, 70.0)
    store.away = True
    cut_off.is_storage_wait(False, 70.0)
    assert waiting.is_storage_wait(True, 70.0)
    now.seconds += 40.0
    assert waiting.is_storage_wait(True, 110.0)
    now.seconds += 40.0
    assert not waiting.is_storage_wait(True, 150.0)  # no rank has reported it for a minute
    cut_off.is_storage_wait(False, 150.0)
    assert waiting.is_storage_wait(True, 150.0)


def test_unresponsive_counter_excuses_no_rank(pair, now, monkeypatch):
    _, waiting, _, _ = pair
    monkeypatch.setattr(storage_waits, "_call_with_limit", lambda function, default: default)
    assert not waiting.is_storage_wait(True, 70.0)


def test_local_files_never_excuse_a_rank(now):
    store = Store()
    store.away = True
    local = SimpleNamespace(run_folder="runs/run", shards=("shards",))
    assert not StorageWaits(local, store, RankOf(0, Counter()), Events()).is_storage_wait(False, 70.0)


def test_rejected_request_counts_as_an_answer(pair, now):
    cut_off, _, store, events = pair
    store.away, store.error = True, AccessDeniedError
    assert not cut_off.is_storage_wait(False, 70.0)
    assert events.lines == []
