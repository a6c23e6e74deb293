"""The order of training samples: a pure function from an integer position to a sample.

The input state of a run is one integer, the number of samples consumed. The order does not depend on the ranks:
`step_positions` assigns the positions of a step to ranks. A run can therefore change its world size at any step
without losing or repeating a sample.

The order of one epoch of a data set is made in four steps:

1. Permute the chunks and concatenate their samples.
2. Cut the sequence into `lanes` segments of equal length.
3. Shuffle each lane within windows.
4. Take samples from the lanes in turn.

If the number of ranks divides `lanes`, each chunk is read by one rank (by two at the cuts), and its samples are used
close together. If an epoch repeats samples of a chunk, the repeats form a further chunk, permuted like the others.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import numpy as np

from m2f.data_pipeline.config import DataConfig
from m2f.data_pipeline.order.chunks import Chunks, group_chunks
from m2f.data_pipeline.order.selection import SamplingRates, select
from m2f.data_pipeline.randomness import Stream, random_words
from m2f.data_pipeline.shards.manifest import Manifest

ORDER_VERSION = 1
"""Part of every fingerprint. Raise it for any change that moves a sample; the golden test then needs a new file."""

_MAX_CACHED_EPOCHS = 3
"""Number of epochs whose permutations stay in memory. A batch can span two epochs, and the loader looks ahead."""

_MAX_LOOK_AHEAD = 20_000
"""Upper limit of `look_ahead` in samples. It bounds the memory and the start-up time of the loader."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Reference to one sample of one data set in one epoch."""

    dataset: int
    """Index of the data set in the mixture."""
    epoch: int
    """Number of completed epochs of the data set before this use."""
    index: int
    """Row of the manifest."""


@dataclass(frozen=True, slots=True)
class SampleRefs:
    """References to the samples at n consecutive positions."""

    dataset: np.ndarray
    """[n] int64 index of the data set in the mixture."""
    index: np.ndarray
    """[n] int64 row of the manifest."""


class Order(Protocol):
    """An endless sequence of samples with random access."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that determines the order. Equal fingerprints mean equal orders."""
        ...

    def at(self, position: int) -> SampleRef:
        """Return the sample at a position, counted from 0."""
        ...

    def refs(self, start: int, count: int) -> SampleRefs:
        """Return the samples at positions start .. start + count - 1."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its rows of the manifest in order, and the position of the first row."""

    number: int
    start: int
    rows: np.ndarray

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


@dataclass(frozen=True)
class DatasetOrder:
    """Order over one data set in exact epochs: `rates` determines how often each epoch shows a sample. Thread-safe."""

    chunks: Chunks
    rates: SamplingRates
    seed: int
    lanes: int
    window: int
    dataset: int = 0
    fingerprint: str = ""
    _epochs: list[_Epoch] = field(default_factory=list, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def at(self, position: int) -> SampleRef:
        """Return the sample at a position. The first use of an epoch permutes it, in about 0.3 us per sample."""
        epoch = self._epoch_at(position)
        return SampleRef(self.dataset, epoch.number, int(epoch.rows[position - epoch.start]))

    def refs(self, start: int, count: int) -> SampleRefs:
        """Return the samples at `count` consecutive positions, starting at `start`."""
        parts, position = [np.zeros(0, dtype=np.int64)], start
        while position < start + count:
            epoch = self._epoch_at(position)
            parts.append(epoch.rows[position - epoch.start : start + count - epoch.start])
            position = epoch.stop
        return SampleRefs(np.full(count, self.dataset), np.concatenate(parts))

    def _epoch_at(self, position: int) -> _Epoch:
        with self._lock:
            epoch = next((e for e in self._epochs if e.start <= position < e.stop), None)
            if epoch is None:
                number = self.rates.epoch_of(position)
                epoch = _Epoch(number, self.rates.total(number), self._permute(number))
                self._epochs[:] = [*self._epochs[1 - _MAX_CACHED_EPOCHS :], epoch]
            return epoch

    def _permute(self, epoch: int) -> np.ndarray:
        sequence = self._permuted_chunks(epoch)
        size, lanes = len(sequence), self.lanes
        # Lane c serves positions c, c + lanes, ..., so its segment has one sample per such position.
        lane_sizes = (size - np.arange(lanes) + lanes - 1) // lanes
        lane_start = np.concatenate([[0], np.cumsum(lane_sizes)[:-1]])
        lane = np.repeat(np.arange(lanes), lane_sizes)
        index_in_lane = np.arange(size) - lane_start[lane]

        words = random_words(self.seed, Stream.WINDOW_ORDER, self.dataset, epoch, lanes + size)
        phase = words[:lanes] % np.uint64(self.window)  # window borders differ between epochs
        window = (index_in_lane + phase[lane].astype(np.int64)) // self.window
        shuffled = sequence[np.lexsort((words[lanes:], window, lane))]

        position = np.arange(size)
        return shuffled[lane_start[position % lanes] + position // lanes]

    def _permuted_chunks(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch, ordered by the permuted chunks.

        The second uses of a chunk's samples form another chunk, as do the third uses, and so on. Repeats are thus
        spread over the epoch instead of following each other.
        """
        counts = self.rates.counts(epoch)[self.chunks.samples]
        samples = np.repeat(self.chunks.samples, counts)
        repeat = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
        chunk = self.chunks.chunk_of[samples] + repeat * len(self.chunks.shard)
        words = random_words(
            self.seed, Stream.CHUNK_ORDER, self.dataset, epoch, len(self.chunks.shard) * int(counts.max())
        )
        rank = np.empty(len(words), dtype=np.int64)
        rank[np.argsort(words, kind="stable")] = np.arange(len(words))
        return samples[np.argsort(rank[chunk], kind="stable")]


@dataclass(frozen=True)
class MixtureOrder:
    """Child orders interleaved by exact shares.

    Among the first P positions, the number of samples of child k (from 0) deviates from its exact share by less than
    max(1, k). Each child is read at its own positions 0, 1, 2, ... in turn.
    """

    children: tuple[Order, ...]
    shares: tuple[Fraction, ...]
    """Share of each child relative to itself and all later children; the last one is 1."""
    fingerprint: str

    def at(self, position: int) -> SampleRef:
        """Return the sample at a position."""
        for child, share in zip(self.children, self.shares, strict=True):
            before = position * share.numerator // share.denominator
            after = (position + 1) * share.numerator // share.denominator
            if after > before:
                return child.at(before)
            position -= before
        raise AssertionError("unreachable: the last share is 1, so it takes all remaining positions")

    def refs(self, start: int, count: int) -> SampleRefs:
        """Return the samples at `count` consecutive positions, starting at `start`."""
        dataset, index = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        remaining = np.arange(count)  # unassigned entries, which are consecutive positions of the later children
        for child, share in zip(self.children, self.shares, strict=True):
            # Python integers hold floor(start * share), which can be large; NumPy integers hold the small rest.
            first, remainder = divmod(start * share.numerator, share.denominator)
            largest = share.denominator + share.numerator * (count + 1)
            exact = np.int64 if largest < 1 << 62 else object
            child_positions = (
                first + (remainder + np.arange(len(remaining) + 1, dtype=exact) * share.numerator) // share.denominator
            )
            is_child = np.diff(child_positions) > 0
            child_refs = child.refs(first, int(np.count_nonzero(is_child)))
            dataset[remaining[is_child]], index[remaining[is_child]] = child_refs.dataset, child_refs.index
            remaining, start = remaining[~is_child], start - first
        return SampleRefs(dataset, index)


@dataclass(frozen=True)
class OffsetOrder:
    """An order that begins at a later position. A run uses it to continue after its data has changed."""

    order: Order
    start: int
    """Position where `order` begins."""

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of `order`; it does not depend on `start`."""
        return self.order.fingerprint

    def at(self, position: int) -> SampleRef:
        """Return the sample at a position, which is at least `start`."""
        return self.order.at(position - self.start)

    def refs(self, start: int, count: int) -> SampleRefs:
        """Return the samples at `count` consecutive positions, starting at `start`."""
        return self.order.refs(start - self.start, count)


def build_order(manifests: Sequence[Manifest], seed: int, config: DataConfig) -> Order:
    """Return the order of the mixture `config.train`, given the manifests of its data sets.

    The fingerprint covers the manifests, the ratios of the weights, the sampling rates, the seed and the shuffle
    settings.

    Raises:
        DataError: the filters leave no image of a data set, or one of them names an unknown class.
    """
    rates = [
        select(manifest, item, config, seed, dataset)
        for dataset, (manifest, item) in enumerate(zip(manifests, config.train, strict=True))
    ]
    weights = [Fraction(str(item.weight)) for item in config.train]
    shares = [weight / sum(weights, Fraction(0)) for weight in weights]
    fingerprint = _fingerprint(manifests, shares, rates, seed, config)
    children = [
        DatasetOrder(
            group_chunks(manifest.shard, manifest.offset, chunk_bytes(config)),
            sampling,
            seed,
            config.lanes,
            config.window,
            dataset,
            fingerprint,
        )
        for dataset, (manifest, sampling) in enumerate(zip(manifests, rates, strict=True))
    ]
    if len(children) == 1:
        return children[0]
    remaining = [sum(shares[k:], Fraction(0)) for k in range(len(shares))]
    return MixtureOrder(
        tuple(children), tuple(s / rest for s, rest in zip(shares, remaining, strict=True)), fingerprint
    )


def _fingerprint(
    manifests: Sequence[Manifest],
    shares: Sequence[Fraction],
    rates: Sequence[SamplingRates],
    seed: int,
    config: DataConfig,
) -> str:
    identity = {
        "version": ORDER_VERSION,
        "seed": seed,
        "chunk_mb": config.chunk_mb,
        "lanes": config.lanes,
        "window": config.window,
        "datasets": [
            [manifest.fingerprint, str(share), sampling.digest()]
            for manifest, share, sampling in zip(manifests, shares, rates, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def chunk_bytes(config: DataConfig) -> int:
    """Return the size of one ranged read in bytes."""
    return max(1, round(config.chunk_mb * 1e6))


def look_ahead(config: DataConfig, world: int) -> int:
    """Return for how many of its next samples a rank keeps data that it has already read.

    A chunk of at most `window` samples lies in at most two windows of a lane, so the range covers all its uses, unless
    it is limited by _MAX_LOOK_AHEAD. With copy-paste, a sample is first used up to one window before its own position.
    `world` is the number of ranks.
    """
    windows = 2 if config.copy_paste is None else 3
    return min(windows * config.lanes * config.window // world, _MAX_LOOK_AHEAD)


def step_positions(
    step: int, global_batch: int, rank: int, world: int, micro_batch: int
) -> tuple[tuple[int | None, ...], ...]:
    """Return the positions of one rank in one optimizer step, grouped by micro-batch.

    With a global batch of G, step s has the positions sG .. sG + G - 1. Rank r of W ranks takes those congruent to r
    modulo W. Every rank has the same number of micro-batches, all of one size of at most `micro_batch`. A position
    None stands for a filler with weight zero.
    """
    first = step * global_batch
    positions: list[int | None] = list(range(first + (rank - first) % world, first + global_batch, world))
    max_per_rank = -(-global_batch // world)
    count = -(-max_per_rank // micro_batch)
    size = -(-max_per_rank // count)
    positions += [None] * (count * size - len(positions))
    return tuple(tuple(positions[k * size : (k + 1) * size]) for k in range(count))
