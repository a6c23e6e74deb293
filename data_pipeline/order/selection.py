"""Which samples of a data set a run uses, and how often in an epoch: decided from the manifest alone."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from m2f.data_pipeline.config import DataConfig, MixtureItem
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.randomness import Stream, random_words
from m2f.data_pipeline.shards.manifest import Manifest

_FRACTION_BITS = 24
"""Rates are whole numbers in units of 2^-24, so that no sum of them is rounded."""
_ONE = 1 << _FRACTION_BITS
"""The rate of one use per epoch."""
_MAX_RATE = 1 << 12
"""Uses per epoch; keeps cumulative counts inside int64 for 2^26 epochs."""


@dataclass(frozen=True)
class SamplingRates:
    """How often N samples are used: a sample with rate r was used floor(e * r + phase) times after e epochs.

    So it is used floor(r) or ceil(r) times in every epoch and never differs from its rate by a whole use, however many
    epochs pass; and any epoch is known without those before it.
    """

    rate: np.ndarray
    """[N] int64 uses per epoch times 2^24; 0 leaves a sample out."""
    phase: np.ndarray
    """[N] int64 below 2^24, in the same unit: when a fractional rate gives its additional uses."""

    @property
    def kept(self) -> np.ndarray:
        """[N] bool, the samples that are used at all."""
        return self.rate > 0

    @property
    def repeats(self) -> bool:
        """Whether any sample is used more than once in some epoch."""
        return bool((self.rate > _ONE).any())

    @property
    def per_epoch(self) -> float:
        """Samples in an epoch, on average, repeats included."""
        return int(self.rate.sum()) / _ONE

    def total(self, epochs: int) -> int:
        """Samples in the first `epochs` epochs, repeats included."""
        if not self.repeats:
            return epochs * int(np.count_nonzero(self.rate))
        return int(self._cumulative(epochs).sum())

    def counts(self, epoch: int) -> np.ndarray:
        """[N] uses of every sample in one epoch."""
        return self._cumulative(epoch + 1) - self._cumulative(epoch)

    def epoch_of(self, position: int) -> int:
        """The epoch that `position` (from 0) belongs to."""
        epoch = int(position / self.per_epoch)
        while self.total(epoch) > position:
            epoch -= 1
        while self.total(epoch + 1) <= position:
            epoch += 1
        return epoch

    def digest(self) -> str:
        """Hash of which samples are used and, where any is repeated, how often."""
        content = np.packbits(self.kept).tobytes()
        return hashlib.sha256(content + (self.rate.tobytes() if self.repeats else b"")).hexdigest()

    def _cumulative(self, epoch: int) -> np.ndarray:
        return (epoch * self.rate + self.phase) >> _FRACTION_BITS


def uniform_rates(kept: np.ndarray) -> SamplingRates:
    """One use in every epoch for samples where `kept` [N] bool is true."""
    return SamplingRates(kept.astype(np.int64) * _ONE, np.zeros(len(kept), dtype=np.int64))


def select(manifest: Manifest, item: MixtureItem, config: DataConfig, seed: int, dataset: int) -> SamplingRates:
    """The sampling rates of one data set of a mixture.

    Filters by target and class come first, then `fraction` and `limit`, then repeats, whose class frequencies are
    those of the samples left.

    Raises:
        DataError: a class that the data set does not have, or no sample is left.
    """
    kept = _with_targets(manifest, config) & _with_classes(manifest, item)
    if not kept.any():
        raise DataError(_empty_selection(manifest, item, config))
    kept &= _subset(manifest, kept, item)
    if item.repeat_threshold is None:
        return uniform_rates(kept)
    factors = np.minimum(repeat_factors(manifest, kept, item.repeat_threshold), _MAX_RATE)
    phase = random_words(seed, Stream.REPEATS, dataset, 0, manifest.num_samples) >> np.uint64(64 - _FRACTION_BITS)
    return SamplingRates(np.where(kept, np.round(factors * _ONE), 0).astype(np.int64), phase.astype(np.int64))


def repeat_factors(manifest: Manifest, kept: np.ndarray, threshold: float) -> np.ndarray:
    """[N] float64, at least 1: how often images should be seen so that rare classes are seen more often.

    f(c) is the share of kept images that show class c, r(c) = max(1, sqrt(threshold / f(c))), and an image takes the
    largest r of its classes (repeat-factor sampling: Gupta et al., "LVIS", CVPR 2019, appendix B.2).
    """
    present = manifest.category_ids
    rows = present.rows()
    ids, column = np.unique(present.values, return_inverse=True)
    images = np.bincount(column[kept[rows]], minlength=len(ids))
    frequency = np.maximum(images, 1) / np.count_nonzero(kept)
    factor = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors = np.ones(manifest.num_samples)
    np.maximum.at(factors, rows, factor[column])
    return factors


def _with_targets(manifest: Manifest, config: DataConfig) -> np.ndarray:
    """[N] bool: images with at least one target of the task (a crowd is none)."""
    if not config.skip_images_without_targets:
        return np.ones(manifest.num_samples, dtype=bool)
    return _shows_any(manifest, list(manifest.categories.labels(config.task)))


def _with_classes(manifest: Manifest, item: MixtureItem) -> np.ndarray:
    kept = np.ones(manifest.num_samples, dtype=bool)
    if item.include:
        kept &= _shows_any(manifest, _ids(manifest, item.include, item.dataset, "include"))
    if item.exclude:
        kept &= ~_shows_any(manifest, _ids(manifest, item.exclude, item.dataset, "exclude"))
    return kept


def _shows_any(manifest: Manifest, category_ids: Sequence[int]) -> np.ndarray:
    """[N] bool: images with a segment of any of these categories."""
    present = manifest.category_ids
    return present.any(np.isin(present.values, category_ids))


def _ids(manifest: Manifest, names: Sequence[str], dataset: str, setting: str) -> list[int]:
    known = {category.name for category in manifest.categories.categories}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`m2f stats` lists them"
            raise DataError(
                f"data.train: {setting} of {dataset!r} names the class {name!r}, which is not in it; {hint}"
            )
    return [category.id for category in manifest.categories.categories if category.name in names]


def _subset(manifest: Manifest, kept: np.ndarray, item: MixtureItem) -> np.ndarray:
    """[N] bool: the part of the kept samples that `fraction` and `limit` leave.

    Keys are ranked by a hash, so the same images are chosen however the data set was sharded, and a smaller part is
    contained in a larger one.
    """
    count = int(np.count_nonzero(kept))
    wanted = max(1, round(Fraction(str(item.fraction)) * count))
    if item.limit is not None:
        wanted = min(wanted, item.limit)
    if wanted >= count:
        return kept
    rows = np.flatnonzero(kept)
    ranks = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in manifest.key[rows]]
    chosen = np.zeros_like(kept)
    chosen[rows[sorted(range(count), key=ranks.__getitem__)[:wanted]]] = True
    return chosen


def _empty_selection(manifest: Manifest, item: MixtureItem, config: DataConfig) -> str:
    total = manifest.num_samples
    if not _with_targets(manifest, config).any():
        return (
            f"{manifest.url}: none of its {total} images has a target for task {config.task!r}; choose another task or "
            "data set"
        )
    return (
        f"{manifest.url}: none of its {total} images passes include {list(item.include)} and exclude "
        f"{list(item.exclude)} of {item.dataset!r} in data.train; loosen them"
    )
