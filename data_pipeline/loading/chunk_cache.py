"""Cache of shard chunks on a local disk with a size limit, shared by all processes of a machine.

    FOLDER/chunks/NAME.chunk    bytes of one ranged read; see `chunk_name`
    FOLDER/chunks/NAME.partial  a chunk being written, or left by a killed process; the next write replaces it
    FOLDER/locks/0 ... 255      a process holds the lock of a chunk's name while it fetches the chunk, so that others
                                wait for its copy; the system releases the locks of a killed process

A complete file is renamed to its final name. Its content is still verified: the manifest has a checksum of every
sample, and a chunk with a damaged sample is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
"""Number of lock files. Chunks whose names have the same hash modulo this number share a lock."""
_CHUNK_SUFFIX = ".chunk"
_EVICTION_TARGET = 0.9
"""Share of the limit that remains after an eviction, so that not every write evicts."""
_SCANS_PER_LIMIT = 64
"""A process scans the folder each time it has written 1/64 of the limit, and so notices files of other processes."""
_MAX_LOOK_AHEAD = 1_000_000
"""Upper limit of positions for which reads are predicted. Each eviction computes them, in about 0.1 s."""


class ChunkCache:
    """Disk cache for chunks. Safe for concurrent threads and processes, even if they are killed."""

    def __init__(
        self, config: CacheConfig, counters: StorageCounters, upcoming: Callable[[], Sequence[str]] = lambda: ()
    ) -> None:
        """Open the cache and create its folders.

        Args:
            config: folder and size limit.
            counters: counters to which hits are added.
            upcoming: returns the names of chunks in the order in which this machine reads them next. Chunks without a
                known use are evicted first.

        Raises:
            StorageError: the folder cannot be created.
        """
        self._chunks, self._locks = Path(config.folder, "chunks"), Path(config.folder, "locks")
        try:
            for folder in (self._chunks, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"data.cache.folder {config.folder} cannot be created ({error.strerror}); choose a folder on a local "
                "disk"
            ) from error
        self._limit = round(config.max_gb * 1e9)
        self._counters, self._upcoming = counters, upcoming
        self._bytes_since_scan = self._limit  # the first write scans the folder
        self._warned = False
        self._damaged = set[str]()
        self._mutex = threading.Lock()

    def read(self, name: str, length: int, fetch: Callable[[], bytes]) -> bytes:
        """Return the chunk `name` of `length` bytes from the disk, or from `fetch`, whose errors are not caught."""
        data = self._load(name, length)
        if data is None:
            with self._locked(name):
                data = self._load(name, length)  # another process may have stored it meanwhile
                if data is None:
                    data = fetch()
                    self._store(name, data)
                    return data
        self._counters.add(cache_hits=1, bytes_cached=len(data))
        return data

    def delete(self, name: str) -> None:
        """Delete a chunk with damaged content. If this is not allowed, this process does not read the chunk again."""
        if not _delete(self._chunks / f"{name}{_CHUNK_SUFFIX}"):
            self._damaged.add(name)

    def _load(self, name: str, length: int) -> bytes | None:
        if name in self._damaged:
            return None
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
        except OSError:  # without a lock two processes may fetch the same chunk, which is harmless
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
            _delete(partial)
            self._reduce_limit(error)
            return
        with self._mutex:
            self._bytes_since_scan += len(data)
            if self._bytes_since_scan <= self._limit // _SCANS_PER_LIMIT:
                return
            self._bytes_since_scan = 0
        self._evict()

    def _reduce_limit(self, error: OSError) -> None:
        """Lower the limit to 90 % of the current content after a failed write, for example on a full disk, and evict.

        Repeated failures bring the limit down to 0.
        """
        sizes = self._sizes()
        self._limit = round(_EVICTION_TARGET * sum(sizes.values()))
        if not self._warned:
            self._warned = True
            disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            log.warning(
                "cannot write to the cache %s (%s); reading continues with its current content%s",
                self._chunks.parent,
                error.strerror,
                ". Free some space, or lower data.cache.max_gb" if disk_full else "",
            )
        self._evict()

    def _evict(self) -> None:
        sizes = self._sizes()
        total = sum(sizes.values())
        if total > self._limit:
            for name in choose_evictions(sizes, self._upcoming(), total - _EVICTION_TARGET * self._limit):
                _delete(self._chunks / f"{name}{_CHUNK_SUFFIX}")

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each chunk on the disk, including those of other processes."""
        sizes = {}
        for path in self._chunks.glob(f"*{_CHUNK_SUFFIX}"):  # none if the folder was deleted during the run
            with suppress(OSError):  # another process evicted it, or the folder is not readable
                sizes[path.name.removesuffix(_CHUNK_SUFFIX)] = path.stat().st_size
        return sizes


def _delete(path: Path) -> bool:
    """Delete a file if it exists. Return False if this is not allowed, for example in a read-only folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def choose_evictions(sizes: Mapping[str, int], upcoming: Iterable[str], excess: float) -> list[str]:
    """Return the names to evict so that at least `excess` bytes become free, or all names if they hold less.

    Names that are not in `upcoming` come first, then those whose next use is farthest away. This is Belady's optimal
    rule (IBM Systems Journal 5(2), 1966).
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
    """Return the name of a byte range of a shard: 32 digits of the shard's SHA-256, the offset and the length in bytes.

    The name is the same in all runs that use the shard.
    """
    return f"{manifest.shards[shard].sha256[:32]}-{start}-{length}"


class UpcomingChunks:
    """Callable that returns the names of the chunks that this machine's ranks read next, in the order of first use."""

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
        """Current position of training, set by the loader."""

    def __call__(self) -> list[str]:
        """Return the names of the upcoming chunks, the next one first."""
        return [
            chunk_name(self._manifests[dataset], *self._chunks[dataset].span(self._manifests[dataset], chunk))
            for dataset, chunk in upcoming_chunks(
                self._order, self._chunks, self.position, self._count, self._world, self._ranks
            )
        ]


def upcoming_chunks(
    order: Order, chunks: Sequence[Chunks], start: int, count: int, world: int, ranks: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the pairs (data set, chunk) that the given ranks use, in the order of first use.

    Covers `count` positions of the order, starting at `start`. `world` is the number of all ranks.
    """
    refs = order.refs(start, count)
    is_local = np.isin(np.arange(start, start + count) % world, ranks)
    dataset, index = refs.dataset[is_local], refs.index[is_local]
    chunk = np.empty_like(index)
    for number, dataset_chunks in enumerate(chunks):
        chunk[dataset == number] = dataset_chunks.chunk_of[index[dataset == number]]
    pairs, first = np.unique(np.stack([dataset, chunk]), axis=1, return_index=True)
    return [(int(d), int(c)) for d, c in pairs[:, np.argsort(first)].T]
