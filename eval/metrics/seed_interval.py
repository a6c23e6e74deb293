"""Confidence intervals over runs with different seeds. No other module needs scipy.stats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class SeedInterval(NamedTuple):
    """A mean, or a difference of means, with its confidence bounds."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> SeedInterval:
    """Return Student's t interval of the mean of at least two runs."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return _interval(mean, error, len(values) - 1, confidence)


def difference_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> SeedInterval:
    """Return Welch's t interval of the mean of `second` minus that of `first`, with at least two runs each."""
    errors = [statistics.variance(side) / len(side) for side in (first, second)]
    total = sum(errors)
    spread = sum(error**2 / (len(side) - 1) for error, side in zip(errors, (first, second), strict=True))
    degrees_of_freedom = total**2 / spread if spread else len(first) + len(second) - 2
    return _interval(
        statistics.fmean(second) - statistics.fmean(first), math.sqrt(total), degrees_of_freedom, confidence
    )


def _interval(value: float, error: float, degrees_of_freedom: float, confidence: float) -> SeedInterval:
    half_width = float(stats.t.ppf(0.5 + confidence / 2, degrees_of_freedom)) * error
    return SeedInterval(value, value - half_width, value + half_width)
