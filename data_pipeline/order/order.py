"""The order of training samples: a pure function from an integer position to an image.

The state of a run's input is one integer, the number of samples consumed. Nothing in the order knows about ranks:
`step_positions` deals the positions of a step to the ranks, so a run may change its world size at any step
without losing or repeating a sample.

One epoch of a data set: chunks are permuted and laid end to end; the sequence is cut into `lanes` equal segments; each
lane is shuffled inside windows; positions go round the lanes. A rank count that divides `lanes` gives every chunk one
owner (two at the cuts), and a chunk's samples are wanted close together. Samples that an epoch repeats come again with
their chunk at another place of the sequence.
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
"""Part of every fingerprint. Raise it with any change that moves a sample; the golden test then needs a new file."""

_EPOCHS_KEPT = 3
"""Permutations in memory: a global batch straddles two epochs at most, and caches look ahead."""

_MAX_LOOK_AHEAD = 20_000
"""Samples; bounds the loader's own memory and start-up time to tens of milliseconds."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Which sample of which data set, and in which epoch."""

    dataset: int
    """Index of the data set in the mixture."""
    epoch: int
    """Epochs of the data set that were completed before."""
    index: int
    """Row of the manifest."""


@dataclass(frozen=True, slots=True)
class SampleRefs:
    """References to the samples at n consecutive positions."""

    dataset: np.ndarray
    """[n] int64"""
    index: np.ndarray
    """[n] int64"""


class Order(Protocol):
    """An endless sequence of samples with random access."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when two orders give the same sample at every position."""
        ...

    def at(self, position: int) -> SampleRef:
        """The sample at a position, from 0."""
        ...

    def refs(self, start: int, count: int) -> SampleRefs:
        """The samples at positions start .. start + count - 1."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """One epoch as rows of the manifest, and the position of the first."""

    number: int
    start: int
    rows: np.ndarray

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


@dataclass(frozen=True)
class DatasetOrder:
    """Exact epochs over one data set: every sample appears in each as often as `rates` says. Safe in threads."""

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
        """The sample at a position. Computes an epoch's permutation on first use (about 0.3 us per sample)."""
        epoch = self._epoch_at(position)
        return SampleRef(self.dataset, epoch.number, int(epoch.rows[position - epoch.start]))

    def refs(self, start: int, count: int) -> SampleRefs:
        """The samples at `count` positions from `start` on."""
        parts, position = [np.zeros(0, dtype=np.int64)], start
        while position < start + count:
            epoch = self._epoch_at(position)
            parts.append(epoch.rows[position - epoch.start : start + count - epoch.start])
            position = epoch.stop
        return SampleRefs(np.full(count, self.dataset), np.concatenate(parts))

    def _epoch_at(self, position: int) -> _Epoch:
        with self._lock:
            found = next((e for e in self._epochs if e.start <= position < e.stop), None)
            if found is None:
                number = self.rates.epoch_of(position)
                found = _Epoch(number, self.rates.total(number), self._permute(number))
                self._epochs[:] = [*self._epochs[1 - _EPOCHS_KEPT :], found]
            return found

    def _permute(self, epoch: int) -> np.ndarray:
        sequence = self._permuted_chunks(epoch)
        size, lanes = len(sequence), self.lanes
        # Lane c serves positions c, c + lanes, ...: its segment of the sequence has exactly that many samples.
        lane_sizes = (size - np.arange(lanes) + lanes - 1) // lanes
        lane_start = np.concatenate([[0], np.cumsum(lane_sizes)[:-1]])
        lane = np.repeat(np.arange(lanes), lane_sizes)
        within = np.arange(size) - lane_start[lane]

        words = random_words(self.seed, Stream.WINDOW_ORDER, self.dataset, epoch, lanes + size)
        phase = words[:lanes] % np.uint64(self.window)  # windows do not meet at the same places in every epoch
        window = (within + phase[lane].astype(np.int64)) // self.window
        shuffled = sequence[np.lexsort((words[lanes:], window, lane))]

        position = np.arange(size)
        return shuffled[lane_start[position % lanes] + position // lanes]

    def _permuted_chunks(self, epoch: int) -> np.ndarray:
        """The epoch's samples, chunk after chunk in this epoch's chunk order.

        Repeats make further chunks of what has a second use, a third, and so on, so that they are spread over the
        epoch and not seen in a row.
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
    """Children interleaved by exact shares: of the first P positions, child k owns P times its share, give or take one
    per child before it; every child is read at its own positions 0, 1, 2, ... in turn.
    """

    children: tuple[Order, ...]
    shares: tuple[Fraction, ...]
    """Share of each child among itself and the later ones; the last is 1."""
    fingerprint: str

    def at(self, position: int) -> SampleRef:
        """The sample at a position."""
        for child, share in zip(self.children, self.shares, strict=True):
            before = position * share.numerator // share.denominator
            after = (position + 1) * share.numerator // share.denominator
            if after > before:
                return child.at(before)
            position -= before
        raise AssertionError("the last share is 1 and takes what the others left")

    def refs(self, start: int, count: int) -> SampleRefs:
        """The samples at `count` positions from `start` on."""
        dataset, index = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        left = np.arange(count)  # those that no child has taken yet; they are neighbours among themselves
        for child, share in zip(self.children, self.shares, strict=True):
            # floor(start * share) in Python's integers, the small rest in numpy's.
            first, rest = divmod(start * share.numerator, share.denominator)
            largest = share.denominator + share.numerator * (count + 1)
            exact = np.int64 if largest < 1 << 62 else object
            owned = first + (rest + np.arange(len(left) + 1, dtype=exact) * share.numerator) // share.denominator
            mine = np.diff(owned) > 0
            found = child.refs(first, int(np.count_nonzero(mine)))
            dataset[left[mine]], index[left[mine]] = found.dataset, found.index
            left, start = left[~mine], start - first
        return SampleRefs(dataset, index)


@dataclass(frozen=True)
class OffsetOrder:
    """An order that begins at a later position: what a run continues with when its data have changed."""

    order: Order
    start: int
    """The position where `order` begins."""

    @property
    def fingerprint(self) -> str:
        """Of the order, wherever it begins."""
        return self.order.fingerprint

    def at(self, position: int) -> SampleRef:
        """The sample at a position, from `start`."""
        return self.order.at(position - self.start)

    def refs(self, start: int, count: int) -> SampleRefs:
        """The samples at `count` positions from `start` on."""
        return self.order.refs(start - self.start, count)


def build_order(manifests: Sequence[Manifest], seed: int, config: DataConfig) -> Order:
    """The order of the mixture `config.train`, whose data sets have these manifests.

    The fingerprint covers the manifests, the weights' ratios, the sampling rates, the seed and the
    shuffle's settings.

    Raises:
        DataError: a data set of which no image is left, or a filter with an unknown class.
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
    left = [sum(shares[k:], Fraction(0)) for k in range(len(shares))]
    return MixtureOrder(tuple(children), tuple(s / rest for s, rest in zip(shares, left, strict=True)), fingerprint)


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
    """Bytes of one ranged read."""
    return max(1, round(config.chunk_mb * 1e6))


def look_ahead(config: DataConfig, world: int) -> int:
    """Own samples ahead of which a rank of `world` keeps what it has read.

    A chunk's samples lie in at most two windows of one lane; nothing read now is wanted later than that. With
    copy-paste a sample is first wanted up to one window before its turn.
    """
    windows = 2 if config.copy_paste is None else 3
    return min(windows * config.lanes * config.window // world, _MAX_LOOK_AHEAD)


def step_positions(
    step: int, global_batch: int, rank: int, world: int, micro_batch: int
) -> tuple[tuple[int | None, ...], ...]:
    """The positions of one rank in one optimizer step, micro-batch by micro-batch.

    Step s owns positions sG .. sG + G - 1, and rank r of W takes those congruent to r modulo W. None is a filler of
    weight zero: every rank has the same number of micro-batches, all of one size (at most `micro_batch`).
    """
    first = step * global_batch
    mine: list[int | None] = list(range(first + (rank - first) % world, first + global_batch, world))
    most = -(-global_batch // world)
    count = -(-most // micro_batch)
    size = -(-most // count)
    mine += [None] * (count * size - len(mine))
    return tuple(tuple(mine[k * size : (k + 1) * size]) for k in range(count))
