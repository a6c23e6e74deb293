"""How sure differences between runs are: over the images that they were evaluated on, and over seeds.

`images`: image sets are drawn again from the evaluated images, the same ones for both runs, and the middle 95 % of the
differences are the interval. It says nothing about the noise of training. `seeds`: runs that differ only in their seed
are one side, and the interval is Student's (Welch's for two sides).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m2f.cluster.compare.records import RunRecord, set_and_metric
from m2f.eval.metrics.resampled import draw_weights
from m2f.eval.metrics.seed_interval import SeedInterval, difference_interval, mean_interval
from m2f.eval.results.images import IMAGES_FILE, ImageRecords

DRAWS = 1000
"""Image sets drawn for an interval."""
CONFIDENCE = 0.95
MIN_SEEDS = 2
NOT_OF_A_SIDE = ("name", "output", "seed")
"""Settings in which the runs of one side may differ."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference to the baseline, or the mean of its seeds, with its bounds."""

    metric: str
    """As `val/PQ`."""
    kind: Literal["images", "seeds"]
    run: str
    """The run, or the first of the runs that differ in their seed."""
    baseline: str | None
    """What `value` is the difference to; None for a mean."""
    value: float
    low: float
    high: float
    images: int | None = None
    """Images that were drawn from; None over seeds."""
    runs: tuple[int, ...] = ()
    """Runs of each side, the baseline's first; empty over images."""


def image_intervals(runs: Sequence[RunRecord], metrics: Sequence[str], draws: int = DRAWS) -> list[Interval]:
    """Intervals of every run against the first, for those of `metrics` that their image records give."""
    intervals: list[Interval] = []
    for dataset in dict.fromkeys(set_and_metric(name)[0] for name in metrics):
        baseline = runs[0].images.get(dataset)
        compared = [run for run in runs[1:] if baseline is not None and _same_images(run, baseline, dataset)]
        if baseline is None or not compared or not draws:
            continue
        # The first draw is the set as it is: every image once.
        once = np.ones((len(baseline.image_ids), 1), dtype=np.int32)
        weights = np.concatenate([once, draw_weights(baseline.image_ids, draws)], axis=1)
        of_baseline = baseline.resampled(weights)
        for run in compared:
            for metric, values in run.images[dataset].resampled(weights).items():
                if f"{dataset}/{metric}" in metrics and metric in of_baseline:
                    differences = values - of_baseline[metric]
                    found = _of_draws(f"{dataset}/{metric}", differences, run.name, runs[0].name, len(once))
                    intervals += [] if found is None else [found]
    return intervals


def _same_images(run: RunRecord, baseline: ImageRecords, dataset: str) -> bool:
    records = run.images.get(dataset)
    return records is not None and np.array_equal(records.image_ids, baseline.image_ids)


def _of_draws(metric: str, differences: np.ndarray, run: str, baseline: str, images: int) -> Interval | None:
    """The middle of the differences, of which the first is that of the whole set; None where it is undefined."""
    drawn = differences[1:][np.isfinite(differences[1:])]
    if not np.isfinite(differences[0]) or not len(drawn):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail]).tolist()
    value = float(differences[0])
    return Interval(
        metric=metric, kind="images", run=run, baseline=baseline, value=value, low=low, high=high, images=images
    )


def seed_intervals(
    runs: Sequence[RunRecord], values: Sequence[Mapping[str, float]], metrics: Sequence[str]
) -> list[Interval]:
    """Intervals of sides with several seeds against the side of the first run; of that side alone, of its mean.

    Args:
        runs: those that are compared.
        values: of every run, its metrics by name.
        metrics: those to take.
    """
    sides = seed_sides(runs)
    intervals = []
    for metric in metrics:
        found = [[values[i][metric] for i in side if metric in values[i]] for side in sides]
        if len(found[0]) < MIN_SEEDS:
            continue
        first = runs[sides[0][0]].name
        others = [(side, of) for side, of in zip(sides[1:], found[1:], strict=True) if len(of) >= MIN_SEEDS]
        for side, of in others:
            counts, bounds = (len(found[0]), len(of)), difference_interval(found[0], of, CONFIDENCE)
            intervals.append(_over_seeds(metric, runs[side[0]].name, first, bounds, counts))
        if not others:
            bounds = mean_interval(found[0], CONFIDENCE)
            intervals.append(_over_seeds(metric, first, None, bounds, (len(found[0]),)))
    return intervals


def _over_seeds(metric: str, run: str, baseline: str | None, bounds: SeedInterval, counts: tuple[int, ...]) -> Interval:
    return Interval(metric=metric, kind="seeds", run=run, baseline=baseline, **bounds._asdict(), runs=counts)


def seed_sides(runs: Sequence[RunRecord]) -> list[list[int]]:
    """Positions of the runs that differ only in name, place and seed, one of every seed; runs of no recipe alone."""
    sides: dict[object, dict[str | None, int]] = {}
    for position, run in enumerate(runs):
        recipe = frozenset((key, value) for key, value in run.recipe.items() if key not in NOT_OF_A_SIDE)
        sides.setdefault(recipe if run.recipe else position, {}).setdefault(run.recipe.get("seed"), position)
    return [list(side.values()) for side in sides.values()]


def interval_notes(runs: Sequence[RunRecord], intervals: Sequence[Interval], sets: Sequence[str]) -> list[str]:
    """What the intervals do not include, and why some are missing."""
    notes = []
    for dataset in sets:
        evaluated = [run for run in runs if dataset in run.results]
        baseline = runs[0].images.get(dataset)
        lacking = [run.name for run in evaluated if dataset not in run.images]
        if len(evaluated) > 1 and lacking:
            notes.append(
                f"{dataset}: no intervals over images for {', '.join(lacking)}, whose results have no {IMAGES_FILE}; "
                "evaluate again with m2f eval"
            )
        others = [run.name for run in evaluated if run.name not in lacking]
        if baseline is not None:
            others = [run.name for run in evaluated if run.name in others and not _same_images(run, baseline, dataset)]
            if others:
                notes.append(
                    f"{dataset}: no intervals over images for {', '.join(others)}: other images were evaluated"
                )
    differences = [one for one in intervals if one.baseline is not None]
    if differences and not any(one.kind == "seeds" for one in differences):
        notes.append(
            "intervals over images do not include the noise of training; for intervals over seeds, train both sides "
            "with several values of `seed`"
        )
    return notes
