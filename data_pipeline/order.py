"""The order of training samples: a pure function from an integer position to an image.

The state of a run's input is one integer, the number of samples consumed. Nothing in the order knows about ranks:
`step_plan` deals the positions of a step to whatever ranks there are, so a run may change its world size at any step
without losing or repeating a sample.

One epoch of a data set: chunks are permuted and laid end to end; the sequence is cut into `lanes` equal segments; each
lane is shuffled inside windows; positions go round the lanes. A rank count that divides `lanes` gives every chunk one
owner (two at the cuts), and a chunk's samples are wanted close together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np

from data_pipeline.chunks import Chunks, plan_chunks
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.randomness import Stream, random_words

ORDER_VERSION = 1
"""Part of every fingerprint. Raise it with any change that moves a sample; the golden test then needs a new file."""

_EPOCHS_KEPT = 2  # a global batch straddles at most two epochs of a data set of ordinary size


@dataclass(frozen=True, slots=True)
class Place:
    """One visit of one image."""

    dataset: int
    """Index of the data set in the mixture."""
    epoch: int
    """How many times the data set was completed before this visit."""
    index: int
    """Row of the manifest."""


class Order(Protocol):
    """An endless sequence of places with random access."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when two orders give the same place at every position."""
        ...

    def at(self, position: int) -> Place:
        """The place at a position, from 0."""
        ...


@dataclass(frozen=True)
class ShardOrder:
    """Exact epochs over the kept samples of one data set: each appears once in positions eN .. eN + N - 1."""

    chunks: Chunks
    keep: np.ndarray
    """[N] bool, the samples that take part."""
    seed: int
    lanes: int
    window: int
    dataset: int = 0
    fingerprint: str = ""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def size(self) -> int:
        """Samples per epoch."""
        return int(np.count_nonzero(self.keep))

    def at(self, position: int) -> Place:
        """The place at a position. Computes an epoch's permutation on first use (about 0.3 us per sample)."""
        epoch, place = divmod(position, self.size)
        return Place(self.dataset, epoch, int(self._permutation(epoch)[place]))

    def _permutation(self, epoch: int) -> np.ndarray:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._permute(epoch)
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = found
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
        """Kept samples [size], chunk after chunk in this epoch's chunk order."""
        words = random_words(self.seed, Stream.CHUNK_ORDER, self.dataset, epoch, len(self.chunks.shard))
        rank = np.empty(len(words), dtype=np.int64)
        rank[np.argsort(words, kind="stable")] = np.arange(len(words))
        kept = self.chunks.samples[self.keep[self.chunks.samples]]
        return kept[np.argsort(rank[self.chunks.chunk_of[kept]], kind="stable")]


@dataclass(frozen=True)
class Mixture:
    """Children interleaved by exact shares: of the first P positions, child k owns P times its share, give or take one
    per child before it; every child is visited at its own positions 0, 1, 2, ... in turn.
    """

    children: tuple[Order, ...]
    shares: tuple[Fraction, ...]
    """Share of each child among itself and the later ones; the last is 1."""
    fingerprint: str

    def at(self, position: int) -> Place:
        """The place at a position."""
        for child, share in zip(self.children, self.shares, strict=True):
            before = position * share.numerator // share.denominator
            after = (position + 1) * share.numerator // share.denominator
            if after > before:
                return child.at(before)
            position -= before
        raise AssertionError("the last share is 1 and takes what the others left")


def build_order(manifests: Sequence[Manifest], weights: Sequence[float], seed: int, config: DataConfig) -> Order:
    """The order of a mixture: data sets with their relative shares of samples.

    The fingerprint covers the manifests, the weights' ratios, the kept samples, the seed and the shuffle's settings.

    Raises:
        DataError: a data set has no image with a target for the task.
    """
    keep = [kept_samples(manifest, config) for manifest in manifests]
    for manifest, kept in zip(manifests, keep, strict=True):
        if not kept.any():
            raise DataError(
                f"{manifest.url}: none of its {len(kept)} images has a target for task {config.task!r}; choose another "
                "task or data set"
            )
    total = sum((Fraction(str(weight)) for weight in weights), Fraction(0))
    shares = [Fraction(str(weight)) / total for weight in weights]
    fingerprint = _fingerprint(manifests, shares, keep, seed, config)
    children = [
        ShardOrder(
            plan_chunks(manifest.shard, manifest.offset, chunk_bytes(config)),
            kept,
            seed,
            config.lanes,
            config.window,
            dataset,
            fingerprint,
        )
        for dataset, (manifest, kept) in enumerate(zip(manifests, keep, strict=True))
    ]
    if len(children) == 1:
        return children[0]
    left = [sum(shares[k:], Fraction(0)) for k in range(len(shares))]
    return Mixture(tuple(children), tuple(s / rest for s, rest in zip(shares, left, strict=True)), fingerprint)


def kept_samples(manifest: Manifest, config: DataConfig) -> np.ndarray:
    """[N] bool: the samples that take part in training, by default those with a target (a crowd is none)."""
    if not config.skip_images_without_targets:
        return np.ones(manifest.num_samples, dtype=bool)
    present = manifest.category_ids
    wanted = np.isin(present.values, list(manifest.categories.labels(config.task)))
    return np.bincount(present.rows()[wanted], minlength=manifest.num_samples) > 0


def _fingerprint(
    manifests: Sequence[Manifest], shares: Sequence[Fraction], keep: Sequence[np.ndarray], seed: int, config: DataConfig
) -> str:
    identity = {
        "version": ORDER_VERSION,
        "seed": seed,
        "chunk_mb": config.chunk_mb,
        "lanes": config.lanes,
        "window": config.window,
        "datasets": [
            [manifest.fingerprint, str(share), hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()]
            for manifest, share, kept in zip(manifests, shares, keep, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def chunk_bytes(config: DataConfig) -> int:
    """Bytes of one ranged read."""
    return max(1, round(config.chunk_mb * 1e6))


def step_plan(
    step: int, global_batch: int, rank: int, world: int, micro_batch: int
) -> tuple[tuple[int | None, ...], ...]:
    """The micro-batches of one rank in one optimizer step, as positions of the order.

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
