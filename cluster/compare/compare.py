"""Comparison of runs: metrics, speed, classes and recipe differences, computed by pure functions of run records.

The first run is the baseline; deltas are differences from it. A missing value is None, never 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from m2f.cluster.compare.errors import CompareError
from m2f.cluster.compare.intervals import (
    NUM_DRAWS,
    Interval,
    image_interval_notes,
    image_intervals,
    seed_intervals,
    seed_notes,
)
from m2f.cluster.compare.paper import PaperResult, paper_result
from m2f.cluster.compare.records import (
    Curve,
    RunRecord,
    compared_step,
    is_training_metric,
    split_metric_name,
)
from m2f.cluster.compare.set_result import CLASS_METRICS, SetResult
from m2f.cluster.evaluation.choice import HEADLINE
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.label_space import describe_subset, match_classes
from m2f.eval.results.results import distinct_names

METRIC_ORDER = (
    *("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"),
    *("PQ_small", "PQ_medium", "PQ_large"),
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    *("mIoU", "fwIoU", "mACC", "pACC", "mIoU_occurring", "mIoU_all"),
)
IDENTITY_SETTINGS = ("name", "output")
"""Settings that only identify a run and its folder. Their differences are not reported."""
IGNORED_SETTINGS = ("weights",)
"""Evaluation settings that always differ between checkpoints. Their differences are not reported."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of one run, with its difference from the baseline."""

    value: float | None
    delta: float | None = None
    """Difference from the baseline; None for the baseline itself, or if one of the two values is missing."""
    best: bool = False
    """Whether this is the best value of the runs or ties with it. False for all runs if the known values are equal."""


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """One row of a table (a metric, a class or a measure of speed) with one value per run."""

    name: str
    values: tuple[Value, ...]
    higher_is_better: bool = True
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """One metric of every class of one evaluation set."""

    dataset: str
    metric: str
    rows: tuple[RunValues, ...]
    """One row per class: the baseline's in the order of results.json, then classes that only other runs have."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting that differs between runs. The value is None for a run whose recipe does not have the setting."""

    setting: str
    values: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One metric over training, with one curve per run; the curve of a run without the metric is empty."""

    metric: str
    x_label: str
    curves: tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The complete comparison that the reports show."""

    runs: tuple[RunRecord, ...]
    metrics: tuple[RunValues, ...]
    steps: Mapping[str, tuple[int | None, ...]]
    """The evaluated step of every run, by evaluation set; None for a run that was not evaluated."""
    paper: PaperResult | None
    speed: tuple[RunValues, ...]
    differences: tuple[Difference, ...]
    classes: tuple[ClassTable, ...]
    plots: tuple[Plot, ...]
    intervals: tuple[Interval, ...]
    """95 % intervals of differences from the baseline, or of the mean over the baseline's seeds."""
    notes: tuple[str, ...]
    """Messages about missing results and about anything that makes numbers hard to compare."""


def compare_runs(
    runs: Sequence[RunRecord], metrics: Sequence[str] = (), step: int | None = None, draws: int = NUM_DRAWS
) -> Comparison:
    """Compare runs with the first run.

    Args:
        runs: at least one run.
        metrics: names such as `PQ` (of every set), `val/PQ` or `train/loss/total`. Empty: all evaluated metrics.
        step: step of the evaluations; None takes the newest one of each run and set.
        draws: number of image sets drawn for intervals over images; 0 leaves these intervals out.

    Raises:
        CompareError: a metric is unknown, no two of several runs have a metric in common, or the classes of runs
            contradict each other.
    """
    names = _choose_metrics([_metric_values(run, step) for run in runs], metrics)
    runs, left_out = _leave_out(runs, names, step)
    by_run = [_metric_values(run, step) for run in runs]
    if len(runs) > 1 and not any(sum(name in values for values in by_run) > 1 for name in names):
        evaluated = "; ".join(f"{run.name}: {_list_metrics(values)}" for run, values in zip(runs, by_run, strict=True))
        raise CompareError(
            f"these runs have no metric in common ({evaluated}). Compare training curves with "
            "--metric train/loss/total, or evaluate the runs on the same set with m2f eval"
        )
    paper = next((row for run in runs if (row := paper_result(run.recipe.get("name", ""))) is not None), None)
    first_set = _first_set(runs, by_run)
    rows = []
    for name in names:
        dataset, metric = split_metric_name(name)
        published = paper.metrics.get(metric) if paper is not None and dataset == first_set else None
        rows.append(_run_values(name, [values.get(name) for values in by_run], paper=published))
    sets = list(dict.fromkeys(split_metric_name(name)[0] for name in names if not is_training_metric(name)))
    class_notes = _compare_classes(runs, sets)
    interval_metrics = [name for name in names if not is_training_metric(name)]
    interval_metrics = [name for name in interval_metrics if metrics or split_metric_name(name)[1] in HEADLINE]
    intervals = [*image_intervals(runs, interval_metrics, draws), *seed_intervals(runs, by_run, interval_metrics)]
    return Comparison(
        runs=tuple(runs),
        metrics=tuple(rows),
        steps={name: tuple(compared_step(name, run.curves, step) for run in runs) for name in sets},
        paper=paper,
        speed=_speed(runs),
        differences=_differences(runs),
        classes=tuple(_class_tables(runs, sets)),
        plots=tuple(_plots(runs, names)),
        intervals=tuple(intervals),
        notes=(
            *left_out,
            *class_notes,
            *_notes(runs, sets, step),
            *(image_interval_notes(runs, interval_metrics) if draws else ()),
            *seed_notes(runs, by_run, interval_metrics or names),
        ),
    )


# Metrics


def _metric_values(run: RunRecord, step: int | None) -> dict[str, float]:
    """Return the run's metrics at the compared step of every set, and its last training metrics.

    Infinite values and NaN are omitted.
    """
    values: dict[str, float] = {}
    for name, curve in run.curves.items():
        if is_training_metric(name):
            values[name] = curve[-1][1]
        else:
            compared = compared_step(split_metric_name(name)[0], run.curves, step)
            values |= {name: value for evaluated, value in curve if evaluated == compared}  # noqa: B035 (at most one)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _choose_metrics(by_run: Sequence[Mapping[str, float]], requested: Sequence[str]) -> list[str]:
    known = sorted({name for values in by_run for name in values}, key=_metric_order)
    if not requested:
        return [name for name in known if not is_training_metric(name)]
    chosen: list[str] = []
    for requested_name in requested:
        found = [name for name in known if requested_name in (name, split_metric_name(name)[1])]
        if not found:
            raise CompareError(
                f"no run has the metric {requested_name!r} at the compared step; available: {', '.join(known)}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def _leave_out(
    runs: Sequence[RunRecord], names: Sequence[str], step: int | None
) -> tuple[Sequence[RunRecord], list[str]]:
    """Return the runs without selected ones that have none of the metrics, and a note for each of those.

    A run that only groups other runs has no metrics, and the newest run often has no evaluation yet. If no run has any
    of the metrics, all runs are returned.
    """
    kept, notes = [], []
    for run in runs:
        if run.is_selected and not _metric_values(run, step).keys() & set(names):
            notes.append(f"{run.name} is left out, because it has none of the compared metrics")
        else:
            kept.append(run)
    return (kept, notes) if kept else (runs, [])


def _metric_order(name: str) -> tuple[str, int, str]:
    dataset, metric = split_metric_name(name)
    return dataset, METRIC_ORDER.index(metric) if metric in METRIC_ORDER else len(METRIC_ORDER), metric


def _run_values(
    name: str, values: Sequence[float | None], *, higher: bool | None = None, paper: float | None = None
) -> RunValues:
    higher = "loss" not in name if higher is None else higher
    defined_values = [value for value in values if value is not None]
    best = (max(defined_values) if higher else min(defined_values)) if len(set(defined_values)) > 1 else None
    baseline = values[0]
    return RunValues(
        name=name,
        values=tuple(
            Value(
                value=value,
                delta=value - baseline if position and value is not None and baseline is not None else None,
                best=value is not None and value == best,
            )
            for position, value in enumerate(values)
        ),
        higher_is_better=higher,
        paper=paper,
    )


def _first_set(runs: Sequence[RunRecord], by_run: Sequence[Mapping[str, float]]) -> str | None:
    """Return the set that the paper's numbers refer to.

    This is the set that the baseline's recipe evaluates first or, if that set has no metrics, the first one that has.
    """
    recipe = runs[0].recipe
    named = recipe.get("evaluation.sets.0.name") or recipe.get("evaluation.sets.0.dataset")
    sets = [split_metric_name(name)[0] for name in by_run[0] if not is_training_metric(name)]
    return named if named in sets else next(iter(sets), None)


def _list_metrics(values: Mapping[str, float]) -> str:
    evaluated = [name for name in values if not is_training_metric(name)]
    return ", ".join(evaluated[:6]) + (", ..." if len(evaluated) > 6 else "") or "not evaluated"


# Speed


def _speed(runs: Sequence[RunRecord]) -> tuple[RunValues, ...]:
    """Return throughput, data wait, time and memory; measures that no run logged are omitted."""

    def measure(name: str, key: str, reduce: Callable[[list[float]], float], *, higher: bool = False) -> RunValues:
        found = [[value for _, value in run.curves.get(key, ())] for run in runs]
        return _run_values(name, [reduce(values) if values else None for values in found], higher=higher)

    memory = sorted({key for run in runs for key in run.curves if is_training_metric(key) and "memory" in key})
    rows = [
        measure("images/s (median)", "train/images_per_s", statistics.median, higher=True),
        measure("step time, s (median)", "train/step_time_s", statistics.median),
        measure("data wait, % (mean)", "train/data_wait_share", lambda shares: 100 * statistics.fmean(shares)),
        _run_values(
            "training time, h", [_training_hours(run.curves.get("train/step_time_s", ())) for run in runs], higher=False
        ),
        measure("MFU, % (median)", "train/mfu", lambda shares: 100 * statistics.median(shares), higher=True),
        *(measure(f"{key.removeprefix('train/')} (largest)", key, max) for key in memory),
    ]
    return tuple(row for row in rows if any(value.value is not None for value in row.values))


def _training_hours(step_times: Curve) -> float | None:
    """Return the hours spent in steps, or None if no step times were logged.

    Each logged step time counts for all steps since the previous logged one.
    """
    if not step_times:
        return None
    return sum(s * (step - before) for (before, _), (step, s) in pairwise([(0, 0.0), *step_times])) / 3600


# Recipes, classes, curves


def _differences(runs: Sequence[RunRecord]) -> tuple[Difference, ...]:
    """Return the settings that differ between runs, in the order of the recipe. Runs without a recipe are ignored."""
    recipes = [run.recipe for run in runs if run.recipe]
    settings = dict.fromkeys(setting for recipe in recipes for setting in recipe)
    return tuple(
        Difference(setting=setting, values=tuple(run.recipe.get(setting) for run in runs))
        for setting in settings
        if setting not in IDENTITY_SETTINGS and len({recipe.get(setting) for recipe in recipes}) > 1
    )


def _class_tables(runs: Sequence[RunRecord], sets: Sequence[str]) -> list[ClassTable]:
    """Return a table per set and metric. Classes of the baseline come first, then classes that only other runs have."""
    tables = []
    for dataset in sets:
        found = [run.results.get(dataset) for run in runs]
        for metric in CLASS_METRICS:
            by_run = [_values_by_class(result, metric) if result else {} for result in found]
            names = dict.fromkeys(name for values in by_run for name in values)
            rows = [_run_values(name, [values.get(name) for values in by_run]) for name in names]
            rows = [row for row in rows if any(value.value is not None for value in row.values)]
            if rows:
                tables.append(ClassTable(dataset=dataset, metric=metric, rows=tuple(rows)))
    return tables


def _values_by_class(result: SetResult, metric: str) -> dict[str, float | None]:
    names = distinct_names(row["name"] for row in result.per_class)
    return {name: row.get(metric) for name, row in zip(names, result.per_class, strict=True)}


def _compare_classes(runs: Sequence[RunRecord], sets: Sequence[str]) -> list[str]:
    """Return messages about classes that only some runs were evaluated on.

    Raises CompareError if the classes of the runs contradict each other.
    """
    notes = []
    for dataset in sets:
        tables = [(run.name, _classes(run.results[dataset])) for run in runs if dataset in run.results]
        tables = [(name, classes) for name, classes in tables if classes]
        for name, classes in tables[1:]:
            first, baseline = tables[0]
            found = match_classes(baseline, classes)
            if found.kind == "conflict" and any(a and b for a, b in found.differing):
                raise CompareError(
                    f"{dataset}: the classes of the runs contradict each other; evaluate both on sets with the same "
                    f"classes:\n  {found.describe_rows(first, name)}"
                )
            if (note := describe_subset(found, first, name)) is not None:
                notes.append(f"{dataset}: {note}; their averages are over different classes")
    return notes


def _classes(result: SetResult) -> list[Category]:
    """Return the classes in results.json, or none if the file does not describe them."""
    rows = result.per_class
    if not all({"id", "name", "is_thing"} <= row.keys() for row in rows):
        return []
    return [Category(row["id"], row["name"], row["is_thing"], (0, 0, 0)) for row in rows]


def _plots(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Plot]:
    """Return plots of the chosen headline metrics, or of all chosen metrics if none is a headline, and of the loss.

    The x axis counts images instead of steps if the global batch differs between runs.
    """
    shown = [name for name in names if split_metric_name(name)[1] in HEADLINE] or list(names)
    shown += [name for name in ("train/loss/total",) if name not in shown and any(name in r.curves for r in runs)]
    batches = [run.recipe.get("training.global_batch") for run in runs]
    by_images = len(set(batches)) > 1 and all(batch is not None and batch.isdecimal() for batch in batches)
    plots = []
    for name in shown:
        curves = []
        for run, batch in zip(runs, batches, strict=True):
            scale = int(batch) if by_images and batch is not None else 1
            curves.append(tuple((float(step * scale), value) for step, value in run.curves.get(name, ())))
        plots.append(Plot(metric=name, x_label="images" if by_images else "steps", curves=tuple(curves)))
    return plots


def _notes(runs: Sequence[RunRecord], sets: Sequence[str], step: int | None) -> list[str]:
    notes = []
    for dataset in sets:
        found = [(run.name, run.results[dataset]) for run in runs if dataset in run.results]
        if len({result.fingerprint for _, result in found}) > 1:
            data = ", ".join(f"{name} {result.fingerprint[:12]}" for name, result in found)
            notes.append(f"{dataset}: the runs were evaluated on different data ({data}); do not compare the numbers")
        if len({(result.subset, result.num_images) for _, result in found}) > 1:
            images = ", ".join(f"{name} {result.subset or f'all {result.num_images}'}" for name, result in found)
            notes.append(f"{dataset}: the runs were evaluated on different images ({images})")
        notes += _settings_notes(dataset, found)
        steps = {found_step for run in runs if (found_step := compared_step(dataset, run.curves, step)) is not None}
        if len(steps) > 1 and step is None:
            notes.append(
                f"{dataset}: the newest evaluations are of different steps; use --step N to compare at the same step"
            )
        missing = [run.name for run in runs if compared_step(dataset, run.curves, step) is None]
        if missing:
            at_step = "" if step is None else f" at step {step}"
            notes.append(f"{dataset}: not evaluated{at_step}: {', '.join(missing)}")
    notes += [f"{run.name} is still running" for run in runs if run.status == "RUNNING"]
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return notes


def _settings_notes(dataset: str, found: Sequence[tuple[str, SetResult]]) -> list[str]:
    """Return one message for each evaluation setting that differs, and one if only some results state settings."""
    known = [(name, dict(result.settings)) for name, result in found if result.settings is not None]
    names = dict.fromkeys(setting for _, settings in known for setting in settings if setting not in IGNORED_SETTINGS)
    notes = []
    for setting in names:
        if len({json.dumps(settings.get(setting), sort_keys=True) for _, settings in known}) > 1:
            values = ", ".join(f"{name} {json.dumps(settings.get(setting))}" for name, settings in known)
            notes.append(
                f"{dataset}: evaluated with different `{setting}` ({values}); this alone may change the numbers"
            )
    unknown = [name for name, result in found if result.settings is None]
    if known and unknown:
        notes.append(
            f"{dataset}: the results of {', '.join(unknown)} do not state the settings of the evaluation, which may "
            "differ; evaluate again with m2f eval"
        )
    return notes
