"""Chunks of shards on a local disk, shared by all processes of a machine, within a size limit.

    FOLDER/chunks/NAME.chunk    bytes of one ranged read; the name says of which shard (by sha256) and which bytes
    FOLDER/chunks/NAME.partial  one being written, or left by a process that was killed and written anew later
    FOLDER/locks/0 ... 255      a process that fetches a chunk holds the lock of its name, so that the others wait for
                                its copy; the system frees the locks of a killed process

A chunk appears by renaming a file that is complete. Its content is not trusted for that: every sample has a checksum
in the manifest, and a chunk with a damaged one is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from m2f.data_pipeline.config import CacheConfig
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.order.chunks import Chunks
from m2f.data_pipeline.order.order import Order
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import StorageCounters

log = logging.getLogger(__name__)

_NUM_LOCKS = 256
"""Lock files; chunks whose names have the same hash modulo this share one."""
_CHUNK_SUFFIX = ".chunk"
_KEPT_AFTER_EVICTION = 0.9
"""Share of the limit that an eviction leaves, so that not every write evicts."""
_SCANS_PER_LIMIT = 64
"""Scans of the folder while a cache of this size is written: processes notice each other's files that often."""
_MAX_LOOK_AHEAD = 1_000_000
"""Positions ahead for which reads are predicted; an eviction computes them all, in about 0.1 s."""


class ChunkCache:
    """Reads chunks through the disk. Safe in threads and processes, and when any of them is killed at any moment."""

    def __init__(
        self, config: CacheConfig, counters: StorageCounters, upcoming: Callable[[], Sequence[str]] = lambda: ()
    ) -> None:
        """Raises StorageError where the folder cannot be made.

        Args:
            config: folder and limit.
            counters: where hits are counted.
            upcoming: names in the order in which this machine reads them next; others are evicted first.
        """
        self._chunks, self._locks = Path(config.folder, "chunks"), Path(config.folder, "locks")
        try:
            for folder in (self._chunks, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"data.cache.folder {config.folder} cannot be made ({error.strerror}); choose a folder on a local disk"
            ) from error
        self._limit = round(config.max_gb * 1e9)
        self._counters, self._upcoming = counters, upcoming
        self._bytes_since_scan = self._limit  # the first write scans the folder
        self._warned = False
        self._mutex = threading.Lock()

    def read(self, name: str, length: int, fetch: Callable[[], bytes]) -> bytes:
        """The chunk `name` of `length` bytes from the disk, else from `fetch`, whose errors pass through."""
        data = self._load(name, length)
        if data is None:
            with self._locked(name):
                data = self._load(name, length)  # another process may have been faster
                if data is None:
                    data = fetch()
                    self._store(name, data)
                    return data
        self._counters.add(cache_hits=1, bytes_cached=len(data))
        return data

    def delete(self, name: str) -> None:
        """Delete a chunk, whose content is damaged."""
        (self._chunks / f"{name}{_CHUNK_SUFFIX}").unlink(missing_ok=True)

    def _load(self, name: str, length: int) -> bytes | None:
        try:
            data = (self._chunks / f"{name}{_CHUNK_SUFFIX}").read_bytes()
        except OSError:
            return None
        return data if len(data) == length else None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            descriptor = os.open(
                self._locks / str(zlib.crc32(name.encode()) % _NUM_LOCKS), os.O_RDWR | os.O_CREAT, 0o666
            )
        except OSError:  # no lock: two processes may fetch the same chunk, which harms nobody
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _store(self, name: str, data: bytes) -> None:
        partial = self._chunks / f"{name}.partial"
        try:
            partial.write_bytes(data)
            partial.replace(self._chunks / f"{name}{_CHUNK_SUFFIX}")
        except OSError as error:
            partial.unlink(missing_ok=True)
            self._reduce_limit(error)
            return
        with self._mutex:
            self._bytes_since_scan += len(data)
            if self._bytes_since_scan <= self._limit // _SCANS_PER_LIMIT:
                return
            self._bytes_since_scan = 0
        self._make_room()

    def _reduce_limit(self, error: OSError) -> None:
        """The disk is full although the limit is not reached, or fails: go on with less, at worst with nothing."""
        sizes = self._sizes()
        self._limit = round(_KEPT_AFTER_EVICTION * sum(sizes.values()))
        if not self._warned:
            self._warned = True
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            log.warning(
                "the cache %s cannot be written (%s); reading goes on with what it holds%s",
                self._chunks.parent,
                error.strerror,
                ". Free some space, or lower data.cache.max_gb" if full else "",
            )
        self._make_room()

    def _make_room(self) -> None:
        sizes = self._sizes()
        held = sum(sizes.values())
        if held > self._limit:
            for name in choose_victims(sizes, self._upcoming(), held - _KEPT_AFTER_EVICTION * self._limit):
                self.delete(name)

    def _sizes(self) -> dict[str, int]:
        """Bytes of every chunk on the disk, whoever wrote it."""
        sizes = {}
        with os.scandir(self._chunks) as entries:
            for entry in entries:
                if entry.name.endswith(_CHUNK_SUFFIX):
                    try:
                        sizes[entry.name.removesuffix(_CHUNK_SUFFIX)] = entry.stat().st_size
                    except FileNotFoundError:  # another process made room
                        continue
        return sizes


def choose_victims(sizes: Mapping[str, int], upcoming: Iterable[str], excess: float) -> list[str]:
    """Names to evict so that `excess` bytes become free: those read last, before them those not read at all.

    Belady's rule, which no other can beat (IBM Systems Journal 5(2), 1966).
    """
    rank = {name: number for number, name in enumerate(upcoming)}
    chosen = []
    for name in sorted(sizes, key=lambda name: (rank.get(name, len(rank)), name), reverse=True):
        if excess <= 0:
            break
        chosen.append(name)
        excess -= sizes[name]
    return chosen


def chunk_name(manifest: Manifest, shard: int, start: int, length: int) -> str:
    """Name of bytes of a shard, the same in every run that uses the shard."""
    return f"{manifest.shards[shard].sha256[:32]}-{start}-{length}"


class UpcomingChunks:
    """What the ranks of this machine will read, in the order of their first need; called by the cache."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        chunks: Sequence[Chunks],
        order: Order,
        world: int,
        ranks: Sequence[int],
    ) -> None:
        self._manifests, self._chunks, self._order = manifests, chunks, order
        self._world, self._ranks = world, list(ranks)
        self._count = min(2 * sum(manifest.num_samples for manifest in manifests), _MAX_LOOK_AHEAD)
        self.position = 0
        """Where training is; set by the loader."""

    def __call__(self) -> list[str]:
        """Names of chunks, the most urgent first."""
        return [
            chunk_name(self._manifests[dataset], *self._chunks[dataset].span(self._manifests[dataset], chunk))
            for dataset, chunk in upcoming_chunks(
                self._order, self._chunks, self.position, self._count, self._world, self._ranks
            )
        ]


def upcoming_chunks(
    order: Order, chunks: Sequence[Chunks], start: int, count: int, world: int, ranks: Sequence[int]
) -> list[tuple[int, int]]:
    """(data set, chunk) in the order of first use by these ranks of `world`, over `count` positions from `start`."""
    refs = order.refs(start, count)
    mine = np.isin(np.arange(start, start + count) % world, ranks)
    dataset, index = refs.dataset[mine], refs.index[mine]
    chunk = np.empty_like(index)
    for number, grouped in enumerate(chunks):
        chunk[dataset == number] = grouped.chunk_of[index[dataset == number]]
    pairs, first = np.unique(np.stack([dataset, chunk]), axis=1, return_index=True)
    return [(int(d), int(c)) for d, c in pairs[:, np.argsort(first)].T]
