"""Fetch samples whose future uses are known.

Chunks are read ahead by ranged reads, samples are verified, and their bytes are kept while they are still needed. If a
checksum is wrong, the bytes are read again. A sample that stays damaged is returned as an error.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.chunk_cache import ChunkCache, chunk_name
from m2f.data_pipeline.order.chunks import Chunks
from m2f.data_pipeline.order.order import SampleRef
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage

_REFETCHES = 3
"""Further reads of a sample with a wrong checksum. They correct transmission errors, but not damage in the store."""
_THREADS = 8
"""Number of concurrent ranged reads, enough to hide the latency of an object store."""
_MAX_HELD_BYTES = 1 << 30
"""Upper limit of bytes of samples that one rank holds."""
_EVICTION_TARGET = 0.9
"""Share of the limit that remains after an eviction, so that not every read evicts."""

Members = Mapping[str, bytes]
"""Members of one sample by extension, the input of `codec.decode`."""

_SampleKey = tuple[int, int]  # data set, row of its manifest
_ChunkKey = tuple[int, int]  # data set, number of the chunk in it


@dataclass(frozen=True, slots=True)
class RawSample:
    """One undecoded sample from its shard."""

    ref: SampleRef
    members: Members | DataError
    """Members by extension, or the error if the sample is unusable."""


@dataclass(frozen=True)
class FetchLimits:
    """Limits of a fetcher: how far it looks ahead and how many bytes it holds."""

    groups_ahead: int
    """Number of groups whose reads are started before the groups are requested."""
    horizon: int
    """Number of groups that are known ahead. Samples that occur in them are kept once they are read."""
    max_bytes: int = _MAX_HELD_BYTES
    """Limit of the bytes held. Above it, samples whose next use is farthest away are dropped and read again later."""


class SampleFetcher:
    """Iterator over groups of samples that are needed together (micro-batches). None is a filler.

    Bookkeeping runs in the consumer's thread; the thread pool only reads.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        chunks: Sequence[Chunks],
        storage: Storage,
        groups: Iterator[Sequence[SampleRef | None]],
        limits: FetchLimits,
        cache: ChunkCache | None = None,
    ) -> None:
        self._closed = threading.Event()
        self._manifests, self._chunks, self._storage = manifests, chunks, storage
        self._groups, self._limits, self._cache = groups, limits, cache
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
        self._future: deque[Sequence[SampleRef | None]] = deque()  # known groups, the next one first
        self._started = 0  # number of groups in `_future` whose reads have been started
        self._uses: Counter[_SampleKey] = Counter()  # uses of each sample in `_future`
        self._reads: dict[_ChunkKey, Future[dict[_SampleKey, Members | DataError]]] = {}  # not yet moved to `_held`
        self._held: dict[_SampleKey, Members | DataError] = {}
        self._etags: dict[str, str | None] = {}  # by the URL of the shard
        self._held_bytes = 0

    def __iter__(self) -> Iterator[tuple[RawSample | None, ...]]:
        return self

    def __next__(self) -> tuple[RawSample | None, ...]:
        """Return the next group. Raises StorageError if a shard cannot be read or does not match the manifest."""
        self._look_ahead()
        if not self._future:
            raise StopIteration
        group = self._future.popleft()
        self._started -= 1
        samples = tuple(None if ref is None else RawSample(ref, self._pop((ref.dataset, ref.index))) for ref in group)
        if self._held_bytes > self._limits.max_bytes:
            self._evict()
        return samples

    def close(self) -> None:
        """Cancel reads that have not started, and stop retries of reads that wait for the store."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look_ahead(self) -> None:
        while len(self._future) < self._limits.horizon and (group := next(self._groups, None)) is not None:
            self._future.append(group)
            self._uses.update((ref.dataset, ref.index) for ref in group if ref is not None)
        while self._started < min(1 + self._limits.groups_ahead, len(self._future)):
            for ref in self._future[self._started]:
                if ref is not None and (ref.dataset, ref.index) not in self._held:
                    self._start_read(self._chunk((ref.dataset, ref.index)))
            self._started += 1

    def _chunk(self, sample: _SampleKey) -> _ChunkKey:
        dataset, index = sample
        return dataset, int(self._chunks[dataset].chunk_of[index])

    def _start_read(self, chunk: _ChunkKey) -> None:
        if chunk not in self._reads:
            dataset, number = chunk
            indices = [int(i) for i in self._chunks[dataset].members(number) if self._uses[dataset, int(i)]]
            self._reads[chunk] = self._pool.submit(self._read, dataset, number, indices)

    def _pop(self, sample: _SampleKey) -> Members | DataError:
        while sample not in self._held:
            chunk = self._chunk(sample)
            self._start_read(chunk)
            for key, members in self._reads[chunk].result().items():
                if self._uses[key] and key not in self._held:
                    self._held[key] = members
                    self._held_bytes += self._size(key)
            del self._reads[chunk]
        members = self._held[sample]
        self._uses[sample] -= 1
        if not self._uses[sample]:
            del self._uses[sample]
            self._discard(sample)
        return members

    def _discard(self, sample: _SampleKey) -> None:
        del self._held[sample]
        self._held_bytes -= self._size(sample)

    def _size(self, sample: _SampleKey) -> int:
        dataset, index = sample
        return int(self._manifests[dataset].length[index])

    def _evict(self) -> None:
        """Drop the samples whose next use is farthest away (Belady's rule)."""
        budget, keep = self._limits.max_bytes * _EVICTION_TARGET, set[_SampleKey]()
        for group in self._future:
            for sample in ((ref.dataset, ref.index) for ref in group if ref is not None):
                if sample in self._held and sample not in keep:
                    budget -= self._size(sample)
                    if budget < 0:
                        for evicted in self._held.keys() - keep:
                            self._discard(evicted)
                        return
                    keep.add(sample)

    def _read(self, dataset: int, number: int, indices: list[int]) -> dict[_SampleKey, Members | DataError]:
        """Return the given samples of a chunk; damaged ones are read again up to 3 times. Runs in a pool thread."""
        with self._storage.retry_until(self._closed):
            return self._read_with_retries(dataset, number, indices)

    def _read_with_retries(
        self, dataset: int, number: int, indices: list[int]
    ) -> dict[_SampleKey, Members | DataError]:
        samples: dict[_SampleKey, Members | DataError] = {}
        for _ in range(1 + _REFETCHES):
            data, start = self._read_span(dataset, number, indices)
            samples |= {(dataset, index): self._split_members(dataset, index, data, start) for index in indices}
            indices = [index for index in indices if isinstance(samples[dataset, index], DataError)]
            if not indices:
                break
            if self._cache is not None:
                self._cache.delete(self._name(dataset, number))
        return samples

    def _read_span(self, dataset: int, number: int, indices: list[int]) -> tuple[memoryview, int]:
        """Return the bytes from the first to the last of the given samples, and the offset of the first byte.

        With a cache, the bytes are the whole chunk.
        """
        manifest = self._manifests[dataset]
        shard, start, length = self._chunks[dataset].span(manifest, number)
        if self._cache is not None:
            name = self._name(dataset, number)
            return memoryview(
                self._cache.read(name, length, lambda: self._fetch_range(dataset, shard, start, length))
            ), start
        start, last = int(manifest.offset[indices[0]]), indices[-1]
        length = int(manifest.offset[last] + manifest.length[last]) - start
        return memoryview(self._fetch_range(dataset, shard, start, length)), start

    def _name(self, dataset: int, number: int) -> str:
        manifest = self._manifests[dataset]
        return chunk_name(manifest, *self._chunks[dataset].span(manifest, number))

    def _fetch_range(self, dataset: int, shard: int, start: int, length: int) -> bytes:
        """Return a byte range of a shard.

        Before the first read of a shard, its size is compared with the manifest. All reads require the ETag found then.
        """
        manifest = self._manifests[dataset]
        url = manifest.shard_url(shard)
        if url not in self._etags:  # two threads may both check, which only costs a request
            self._etags[url] = manifest.check_shard(shard, self._storage).etag
        return self._storage.get_range(url, start, length, self._etags[url])

    def _split_members(self, dataset: int, index: int, data: memoryview, start: int) -> Members | DataError:
        manifest = self._manifests[dataset]
        first = int(manifest.offset[index]) - start
        try:
            return manifest.members(index, data[first : first + int(manifest.length[index])])
        except DataError as error:
            return error


def read_single(manifest: Manifest, index: int, storage: Storage) -> Members:
    """Read the members of one sample. Raises DataError if it is still damaged after 3 further reads."""
    for _ in range(_REFETCHES):
        try:
            return manifest.read_members(index, storage)
        except DataError:
            continue
    return manifest.read_members(index, storage)
