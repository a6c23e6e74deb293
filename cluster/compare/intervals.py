"""Confidence intervals of differences between runs, over evaluated images and over seeds.

`images`: a paired bootstrap. Image sets are resampled from the evaluated images, the same sets for both runs, and the
interval is the middle 95 % of the differences. It does not reflect the variation between training runs. `seeds`: runs
of one recipe with different seeds form a group, and the interval is Student's t interval (Welch's for two groups).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m2f.cluster.compare.records import RunRecord, split_metric_name
from m2f.eval.metrics.resampled import draw_weights
from m2f.eval.metrics.seed_interval import SeedInterval, difference_interval, mean_interval
from m2f.eval.results.images import IMAGES_FILE, RESAMPLED_METRICS, ImageRecords

NUM_DRAWS = 1000
"""Number of image sets that are drawn for an interval."""
MIN_DRAWS = 40
"""Smallest number of draws. With fewer, less than one draw lies outside either end of an interval of 95 %."""
CONFIDENCE = 0.95
"""Share of the draws, or of the t distribution, that an interval covers: the level that papers usually report."""
MIN_SEEDS = 2
"""Smallest number of seeds for an interval: a t interval needs a standard deviation."""
SETTINGS_IGNORED_IN_GROUPS = ("name", "output", "seed", "training.micro_batch")
"""Settings in which the runs of one group may differ. A run may halve its micro-batch if memory does not suffice."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Interval of a difference from the baseline, or of the mean over the baseline's seeds."""

    metric: str
    """Set and metric, such as `val/PQ`."""
    kind: Literal["images", "seeds"]
    run: str
    """Name of the run, or of the first run of a group over seeds."""
    baseline: str | None
    """Name of the run that `value` is the difference from; None if `value` is a mean."""
    value: float
    low: float
    high: float
    images: int | None = None
    """Number of images from which sets are drawn; None for an interval over seeds."""
    runs: tuple[int, ...] = ()
    """Number of runs of each group, the baseline's first; empty for an interval over images."""


def image_intervals(runs: Sequence[RunRecord], metrics: Sequence[str], draws: int = NUM_DRAWS) -> list[Interval]:
    """Return the intervals of every run against the first run, for the `metrics` among RESAMPLED_METRICS.

    Runs that were not evaluated on the same images as the first run are omitted.
    """
    intervals: list[Interval] = []
    for dataset, chosen in _resampled_metrics(metrics).items():
        baseline = runs[0].images.get(dataset)
        compared = [run for run in runs[1:] if baseline is not None and _same_images(run, baseline, dataset)]
        if baseline is None or not compared or not draws:
            continue
        # The first draw is the original set, with every image once.
        original = np.ones((len(baseline.image_ids), 1), dtype=np.int32)
        weights = np.concatenate([original, draw_weights(baseline.image_ids, draws)], axis=1)
        baseline_values = baseline.resampled(weights, chosen)
        for run in compared:
            for metric, values in run.images[dataset].resampled(weights, chosen).items():
                if metric in baseline_values:
                    differences = values - baseline_values[metric]
                    name = f"{dataset}/{metric}"
                    found = _bootstrap_interval(name, differences, run.name, runs[0].name, len(original))
                    intervals += [] if found is None else [found]
    return intervals


def _resampled_metrics(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the metrics that image records can give, by set."""
    metrics: dict[str, list[str]] = {}
    for dataset, metric in map(split_metric_name, names):
        if metric in RESAMPLED_METRICS:
            metrics.setdefault(dataset, []).append(metric)
    return metrics


def _same_images(run: RunRecord, baseline: ImageRecords, dataset: str) -> bool:
    records = run.images.get(dataset)
    return records is not None and np.array_equal(records.image_ids, baseline.image_ids)


def _bootstrap_interval(metric: str, differences: np.ndarray, run: str, baseline: str, images: int) -> Interval | None:
    """Return the middle CONFIDENCE share of the differences as an interval, or None if it is undefined.

    The first difference is that of the original set and becomes the value; the others are those of the draws.
    """
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
    """Return the intervals of groups with at least MIN_SEEDS seeds against the group of the first run.

    If only the first run's group has enough seeds, return the interval of its mean.

    Args:
        runs: the compared runs.
        values: metrics of each run, by name.
        metrics: names of the metrics to use.
    """
    groups = seed_groups(runs)
    intervals = []
    for metric in metrics:
        by_group = [[values[i][metric] for i in group if metric in values[i]] for group in groups]
        baseline_values = by_group[0]
        if len(baseline_values) < MIN_SEEDS:
            continue
        first = runs[groups[0][0]].name
        others = zip(groups[1:], by_group[1:], strict=True)
        compared = [(group, group_values) for group, group_values in others if len(group_values) >= MIN_SEEDS]
        for group, group_values in compared:
            counts = (len(baseline_values), len(group_values))
            bounds = difference_interval(baseline_values, group_values, CONFIDENCE)
            intervals.append(_seed_interval(metric, runs[group[0]].name, first, bounds, counts))
        if not compared:
            bounds = mean_interval(baseline_values, CONFIDENCE)
            intervals.append(_seed_interval(metric, first, None, bounds, (len(baseline_values),)))
    return intervals


def _seed_interval(
    metric: str, run: str, baseline: str | None, bounds: SeedInterval, counts: tuple[int, ...]
) -> Interval:
    return Interval(metric=metric, kind="seeds", run=run, baseline=baseline, **bounds._asdict(), runs=counts)


def seed_groups(runs: Sequence[RunRecord]) -> list[list[int]]:
    """Group the positions of runs that differ only in SETTINGS_IGNORED_IN_GROUPS.

    Only the first run of each seed counts. A run without a recipe forms its own group.
    """
    groups: dict[object, dict[str | None, int]] = {}
    for position, run in enumerate(runs):
        groups.setdefault(_group_key(run), {}).setdefault(run.recipe.get("seed"), position)
    return [list(group.values()) for group in groups.values()]


def _group_key(run: RunRecord) -> object:
    """Return the settings that the runs of one group have in common; for a run without a recipe, its name."""
    settings = run.recipe.items()
    return frozenset((k, v) for k, v in settings if k not in SETTINGS_IGNORED_IN_GROUPS) if run.recipe else run.name


def image_interval_notes(runs: Sequence[RunRecord], metrics: Sequence[str]) -> list[str]:
    """Return messages about the runs and metrics without intervals over images."""
    notes = []
    for dataset in _resampled_metrics(metrics):
        evaluated = [run for run in runs if dataset in run.results]
        baseline = runs[0].images.get(dataset)
        without_records = [run.name for run in evaluated if dataset not in run.images]
        if len(evaluated) > 1 and without_records:
            notes.append(
                f"{dataset}: no intervals over images for {', '.join(without_records)}, whose results have no "
                f"{IMAGES_FILE}; evaluate again with m2f eval"
            )
        others = [run.name for run in evaluated if run.name not in without_records]
        if baseline is not None:
            others = [run.name for run in evaluated if run.name in others and not _same_images(run, baseline, dataset)]
            if others:
                notes.append(
                    f"{dataset}: no intervals over images for {', '.join(others)}: evaluated on different images"
                )
    without = [name for name in metrics if split_metric_name(name)[1] not in RESAMPLED_METRICS]
    if len(runs) > 1 and without:
        notes.append(
            f"no intervals over images for {', '.join(without)}; they exist only for {', '.join(RESAMPLED_METRICS)}"
        )
    return notes


def seed_notes(runs: Sequence[RunRecord], values: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> list[str]:
    """Return a message if a side of the comparison has one run. The arguments are those of `seed_intervals`."""
    groups = seed_groups(runs) if len(runs) > 1 else []
    counts = [[sum(metric in values[i] for i in group) for metric in metrics] for group in groups]
    single = [
        runs[i].name
        for group, by_metric in zip(groups, counts, strict=True)
        if any(0 < count < MIN_SEEDS for count in by_metric)
        for i in group
    ]
    if not single:
        return []
    return [
        f"{', '.join(single)}: trained only once, so differences may be due to the variation between training "
        "runs; for intervals over seeds, train each compared recipe with several values of `seed`"
    ]
