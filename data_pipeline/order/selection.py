"""Select the samples of a data set that a run uses, and their number of uses per epoch, from the manifest alone."""

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
"""Rates are integers in units of 2^-24, so that their sums are exact."""
_ONE = 1 << _FRACTION_BITS
"""The rate of one use per epoch."""
_MAX_RATE = 1 << 12
"""Upper limit of uses per epoch. It keeps cumulative counts within int64 for 2^26 epochs."""


@dataclass(frozen=True)
class SamplingRates:
    """Uses per epoch of N samples. After e epochs, a sample with rate r has been used floor(e * r + phase) times.

    Each epoch uses it floor(r) or ceil(r) times. The total never deviates from e * r by a whole use, and each epoch can
    be computed without the previous ones.
    """

    rate: np.ndarray
    """[N] int64 uses per epoch times 2^24; 0 leaves a sample out."""
    phase: np.ndarray
    """[N] int64 below 2^24, in the same unit. It determines in which epochs a fractional rate gives an extra use."""

    @property
    def selected(self) -> np.ndarray:
        """Return [N] bool: the samples that are used at all."""
        return self.rate > 0

    @property
    def repeats(self) -> bool:
        """Return whether any sample is used more than once in some epoch."""
        return bool((self.rate > _ONE).any())

    @property
    def per_epoch(self) -> float:
        """Return the mean number of samples in an epoch, repeats included."""
        return int(self.rate.sum()) / _ONE

    def total(self, epochs: int) -> int:
        """Return the number of samples in the first `epochs` epochs, repeats included."""
        if not self.repeats:
            return epochs * int(np.count_nonzero(self.rate))
        return int(self._cumulative(epochs).sum())

    def counts(self, epoch: int) -> np.ndarray:
        """Return [N] int64: uses of each sample in one epoch."""
        return self._cumulative(epoch + 1) - self._cumulative(epoch)

    def epoch_of(self, position: int) -> int:
        """Return the epoch of a position. Both are counted from 0."""
        epoch = int(position / self.per_epoch)
        while self.total(epoch) > position:
            epoch -= 1
        while self.total(epoch + 1) <= position:
            epoch += 1
        return epoch

    def digest(self) -> str:
        """Return a hash of the samples that are used and, if any is repeated, of the rates."""
        content = np.packbits(self.selected).tobytes()
        return hashlib.sha256(content + (self.rate.tobytes() if self.repeats else b"")).hexdigest()

    def _cumulative(self, epoch: int) -> np.ndarray:
        return (epoch * self.rate + self.phase) >> _FRACTION_BITS


def uniform_rates(selected: np.ndarray) -> SamplingRates:
    """Return a rate of one use per epoch for the samples in `selected` ([N] bool), and 0 for all others."""
    return SamplingRates(selected.astype(np.int64) * _ONE, np.zeros(len(selected), dtype=np.int64))


def select(manifest: Manifest, item: MixtureItem, config: DataConfig, seed: int, dataset: int) -> SamplingRates:
    """Return the sampling rates of one data set of a mixture.

    Filters by target and class are applied first, then `fraction` and `limit`, then repeats. Repeats use the class
    frequencies of the remaining samples.

    Raises:
        DataError: a filter names a class that the data set lacks, or no sample is left.
    """
    selected = _with_targets(manifest, config) & _with_classes(manifest, item)
    if not selected.any():
        raise DataError(_empty_selection_message(manifest, item, config))
    selected &= _subset(manifest, selected, item)
    if item.repeat_threshold is None:
        return uniform_rates(selected)
    labels = manifest.categories.labels(config.task)
    factors = np.minimum(repeat_factors(manifest, selected, item.repeat_threshold, list(labels)), _MAX_RATE)
    phase = random_words(seed, Stream.REPEATS, dataset, 0, manifest.num_samples) >> np.uint64(64 - _FRACTION_BITS)
    return SamplingRates(np.where(selected, np.round(factors * _ONE), 0).astype(np.int64), phase.astype(np.int64))


def repeat_factors(
    manifest: Manifest, selected: np.ndarray, threshold: float, category_ids: Sequence[int]
) -> np.ndarray:
    """Return [N] float64 of at least 1: uses per epoch of each image, larger for images with rare classes.

    Only the classes in `category_ids` count.

    f(c) is the share of selected images that show class c, and r(c) = max(1, sqrt(threshold / f(c))). The factor of an
    image is the largest r of its classes (repeat-factor sampling: Gupta et al., "LVIS", CVPR 2019, appendix B.2).
    """
    present = manifest.category_ids
    counted = np.isin(present.values, category_ids)
    rows = present.rows()[counted]
    ids, column = np.unique(present.values[counted], return_inverse=True)
    images = np.bincount(column[selected[rows]], minlength=len(ids))
    frequency = np.maximum(images, 1) / np.count_nonzero(selected)
    factor = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors = np.ones(manifest.num_samples)
    np.maximum.at(factors, rows, factor[column])
    return factors


def _with_targets(manifest: Manifest, config: DataConfig) -> np.ndarray:
    """Return [N] bool: images with at least one target of the task. Crowds are not targets."""
    if not config.skip_images_without_targets:
        return np.ones(manifest.num_samples, dtype=bool)
    return _has_category(manifest, list(manifest.categories.labels(config.task)))


def _with_classes(manifest: Manifest, item: MixtureItem) -> np.ndarray:
    selected = np.ones(manifest.num_samples, dtype=bool)
    if item.include:
        selected &= _has_category(manifest, _category_ids(manifest, item.include, item.dataset, "include"))
    if item.exclude:
        selected &= ~_has_category(manifest, _category_ids(manifest, item.exclude, item.dataset, "exclude"))
    return selected


def _has_category(manifest: Manifest, category_ids: Sequence[int]) -> np.ndarray:
    """Return [N] bool: images with a segment of any of these categories."""
    present = manifest.category_ids
    return present.any(np.isin(present.values, category_ids))


def _category_ids(manifest: Manifest, names: Sequence[str], dataset: str, setting: str) -> list[int]:
    known = {category.name for category in manifest.categories.categories}
    for name in names:
        if name not in known:
            matches = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {matches[0]!r}?" if matches else "`m2f stats` lists its classes"
            raise DataError(
                f"data.train: {setting} of {dataset!r} lists the class {name!r}, which it does not have; {hint}"
            )
    return [category.id for category in manifest.categories.categories if category.name in names]


def _subset(manifest: Manifest, selected: np.ndarray, item: MixtureItem) -> np.ndarray:
    """Return [N] bool: the selected samples that remain after `fraction` and `limit`.

    Samples are ranked by a hash of their keys. The selection therefore does not depend on the sharding, and a larger
    selection contains a smaller one.
    """
    count = int(np.count_nonzero(selected))
    num_selected = max(1, round(Fraction(str(item.fraction)) * count))
    if item.limit is not None:
        num_selected = min(num_selected, item.limit)
    if num_selected >= count:
        return selected
    rows = np.flatnonzero(selected)
    ranks = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in manifest.key[rows]]
    chosen = np.zeros_like(selected)
    chosen[rows[sorted(range(count), key=ranks.__getitem__)[:num_selected]]] = True
    return chosen


def _empty_selection_message(manifest: Manifest, item: MixtureItem, config: DataConfig) -> str:
    total = manifest.num_samples
    if not _with_targets(manifest, config).any():
        return (
            f"{manifest.url}: none of its {total} images has a target for task {config.task!r}; choose another task or "
            "data set"
        )
    return (
        f"{manifest.url}: none of its {total} images matches include {list(item.include)} and exclude "
        f"{list(item.exclude)} of {item.dataset!r} in data.train; relax these filters"
    )
