import errno
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.data_pipeline.config import CacheConfig, DataConfig, MixtureItem
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.loading.chunk_cache import ChunkCache, UpcomingChunks, choose_evictions, upcoming_chunks
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.storage.storage import StorageCounters
from m2f.model.errors import ConfigError
from tests.mounts import read_only
from tests.waiting import wait_until


def make_cache(folder, max_bytes=10_000, upcoming=lambda: ()):
    return ChunkCache(CacheConfig(folder=str(folder), max_gb=max_bytes / 1e9), StorageCounters(), upcoming)


def content(name, length=1000):
    return random.Random(name).randbytes(length)


def cached_sizes(folder):
    return {path.stem: path.stat().st_size for path in Path(folder, "chunks").glob("*.chunk")}


def test_a_chunk_is_fetched_once_and_shared(tmp_path):
    fetched = []

    def fetch():
        fetched.append(1)
        return content("a")

    first, second = make_cache(tmp_path), make_cache(tmp_path)
    assert [cache.read("a", 1000, fetch) for cache in (first, second, first)] == [content("a")] * 3
    assert len(fetched) == 1
    assert (first._counters.cache_hits, second._counters.bytes_cached) == (1, 1000)
    first.delete("a")
    second.read("a", 1000, fetch)
    assert len(fetched) == 2


def test_simultaneous_readers_wait_for_one_fetch(tmp_path):
    fetched = []

    def fetch():
        fetched.append(1)
        time.sleep(0.2)
        return content("a")

    results = []
    caches = [make_cache(tmp_path) for _ in range(6)]
    threads = [threading.Thread(target=lambda c=c: results.append(c.read("a", 1000, fetch))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content("a")] * 6
    assert len(fetched) == 1


def test_failed_fetch_raises_and_leaves_no_file(tmp_path):
    cache = make_cache(tmp_path)

    def fetch():
        raise StorageError("no such shard")

    with pytest.raises(StorageError, match="no such shard"):
        cache.read("a", 1000, fetch)
    assert not cached_sizes(tmp_path)


def test_a_truncated_file_is_a_cache_miss(tmp_path):
    cache = make_cache(tmp_path)
    cache.read("a", 1000, lambda: content("a"))
    path = tmp_path / "chunks" / "a.chunk"
    path.write_bytes(path.read_bytes()[:500])
    assert cache.read("a", 1000, lambda: content("a")) == content("a")


def test_cache_stays_below_its_limit_and_evicts_the_latest_needed_chunks(tmp_path):
    names = [f"n{i}" for i in range(40)]
    cache = make_cache(tmp_path, 10_000, lambda: names[::-1])  # the last ones written are needed first
    for name in names:
        cache.read(name, 1000, lambda name=name: content(name))
        assert sum(cached_sizes(tmp_path).values()) <= 10_000
    assert set(cached_sizes(tmp_path)) <= set(names[-10:])
    assert len(cached_sizes(tmp_path)) >= 8


@given(
    sizes=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), min_size=1),
    upcoming=st.permutations("abcdef"),
    excess=st.integers(0, 40),
)
def test_evicted_chunks_are_those_needed_last(sizes, upcoming, excess):
    evicted = choose_evictions(sizes, upcoming, excess)
    freed = sum(sizes[name] for name in evicted)
    assert freed >= min(excess, sum(sizes.values()))
    assert not evicted or freed - sizes[evicted[-1]] < excess
    next_use = {name: upcoming.index(name) if name in upcoming else 99 for name in sizes}
    assert all(next_use[a] >= next_use[b] for a in evicted for b in sizes.keys() - set(evicted))


def test_full_disk_shrinks_the_cache_with_one_warning(tmp_path, monkeypatch, caplog):
    cache = make_cache(tmp_path)
    for name in "abcd":
        cache.read(name, 1000, lambda name=name: content(name))

    def raise_full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", raise_full_disk)
    with caplog.at_level(logging.WARNING):
        for name in "efghij":
            assert cache.read(name, 1000, lambda name=name: content(name)) == content(name)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert "data.cache.max_gb" in caplog.text
    assert sum(cached_sizes(tmp_path).values()) < 4000
    assert not list(tmp_path.rglob("*.partial"))


def test_cache_folder_deleted_during_a_run_causes_one_warning(tmp_path, caplog):
    cache = make_cache(tmp_path / "cache")
    cache.read("a", 1000, lambda: content("a"))
    shutil.rmtree(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        for name in "bc":
            assert cache.read(name, 1000, lambda name=name: content(name)) == content(name)
    assert len(caplog.records) == 1
    assert "No such file or directory" in caplog.text


def test_reading_continues_with_a_read_only_cache_folder_and_skips_its_damaged_chunks(tmp_path, caplog):
    writer = make_cache(tmp_path / "cache")
    writer.read("good", 1000, lambda: content("good"))
    writer.read("bad", 1000, lambda: bytes(1000))
    with read_only(tmp_path / "cache"):
        cache = make_cache(tmp_path / "cache", 500)  # less than the content, so that each write evicts
        assert cache.read("bad", 1000, lambda: content("bad")) == bytes(1000)
        cache.delete("bad")
        assert cache.read("bad", 1000, lambda: content("bad")) == content("bad")
        assert cache.read("new", 1000, lambda: content("new")) == content("new")
        assert cache.read("good", 1000, lambda: b"") == content("good")
    assert len(caplog.records) == 1
    assert "Read-only file system" in caplog.text


def test_unusable_cache_folder_raises_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data\.cache\.folder .*file/x cannot be created"):
        make_cache(tmp_path / "file" / "x")
    with pytest.raises(ConfigError, match=r"CacheConfig: max_gb"):
        CacheConfig(folder="x", max_gb=0)


def read_forever(folder, seed, reads):
    cache, rng = make_cache(folder, 50_000), random.Random(seed)
    for reads.value in itertools.count():
        name = f"n{rng.randrange(100)}"
        assert cache.read(name, 1000, lambda name=name: content(name)) == content(name)


def kill_readers(folder, rounds):
    context = multiprocessing.get_context("fork")
    for round_number in range(rounds):
        counts = [context.Value("Q", 0, lock=False) for _ in range(3)]
        readers = [
            context.Process(target=read_forever, args=(folder, 10 * round_number + i, counts[i])) for i in range(3)
        ]
        for reader in readers:
            reader.start()
        wanted = random.Random(round_number).randint(50, 500)
        wait_until(lambda wanted=wanted, counts=counts: min(reads.value for reads in counts) > wanted, pause_s=0.001)
        for reader in readers:
            assert reader.is_alive()
            os.kill(reader.pid, signal.SIGKILL)
            reader.join()
        for path in Path(folder, "chunks").glob("*.chunk"):
            assert path.read_bytes() == content(path.stem)
    cache = make_cache(folder, 50_000)
    for name in (f"n{i}" for i in range(100)):
        assert cache.read(name, 1000, lambda name=name: content(name)) == content(name)
    assert sum(cached_sizes(folder).values()) <= 50_000


def test_killed_readers_leave_only_complete_chunks(tmp_path):
    kill_readers(tmp_path, rounds=2)


@pytest.mark.soak
def test_readers_killed_many_times_leave_only_complete_chunks(tmp_path):
    kill_readers(tmp_path, rounds=40)


def test_upcoming_chunks_equal_a_brute_force_search(make_manifest):
    manifests = [make_manifest(300, seed=s, sample_bytes=4000, shard_samples=50) for s in (1, 2)]
    items = (MixtureItem(dataset="a", weight=2), MixtureItem(dataset="b"))
    order = build_order(manifests, 0, DataConfig(train=items, chunk_mb=0.03, lanes=6, window=8))
    chunks = [group_chunks(m.shard, m.offset, 30_000) for m in manifests]
    expected = []
    for position in range(77, 77 + 500):
        ref = order.at(position)
        chunk = (ref.dataset, int(chunks[ref.dataset].chunk_of[ref.index]))
        if position % 5 in (1, 3) and chunk not in expected:
            expected.append(chunk)
    assert upcoming_chunks(order, chunks, 77, 500, 5, [1, 3]) == expected
    upcoming = UpcomingChunks(manifests, chunks, order, 1, [0])
    names = upcoming()
    assert len(names) == len(set(names)) == sum(len(c.shard) for c in chunks)
    first = manifests[order.at(0).dataset].offset[order.at(0).index]
    start, length = map(int, names[0].split("-")[1:])
    assert start <= first < start + length
