"""`python -m benchmarks.quality.make_tables FOLDER ...`: print all tables of a comparison as Markdown."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.quality.arms import (
    ALL_ARMS,
    COMPARISONS,
    IMAGE_SETS,
    JUDGED_SEEDS,
    METRICS,
    Arm,
    Comparison,
    ImageSet,
    Run,
)
from benchmarks.quality.bars import report_lines
from benchmarks.quality.differences import Difference, Results, cpu_ratio, paired_difference, read_results
from benchmarks.quality.finished_runs import keep_run
from benchmarks.quality.markdown import markdown
from benchmarks.quality.point_costs import costs_table, read_costs, write_costs
from m2f.cluster.terminal import print_out


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables of the image sets with evaluated runs, point costs, missing runs and verdicts on bars; return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.make_tables", description=__doc__)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="folders written by run_arms, point_costs --save, or --keep"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="first copy the results of finished runs and the costs of points to DIR",
    )
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="section.key=value", help="settings used to train the runs"
    )
    arguments = parser.parse_args(argv)
    folders: list[Path] = arguments.folders
    results = {image_set.name: read_results(folders, image_set) for image_set in IMAGE_SETS}
    for name, set_results in results.items():
        if set_results:
            print_out("\n\n".join((f"## {name}", spread_table(set_results), difference_table(set_results), "")))
    costs = read_costs(folders)
    if costs:
        print_out(f"## Cost of points\n\n{costs_table(costs)}\n")
    finished = {
        image_set.name: _finished(image_set, results[image_set.name], arguments.overrides) for image_set in IMAGE_SETS
    }
    if arguments.keep is not None:
        _keep(finished, folders, arguments.keep)
    print_out("## Bars and missing runs\n")
    for line in report_lines(finished, costs):
        print_out(f"- {line}")
    return 0


def _keep(finished: Mapping[str, Results], folders: Sequence[Path], destination: Path) -> None:
    arms = {arm.name: arm for arm in ALL_ARMS}
    for image_set in IMAGE_SETS:
        for name, seed in finished[image_set.name]:
            for folder in set(folders) - {destination}:
                keep_run(folder, destination, Run(image_set, arms[name], seed))
    if costs := read_costs([destination, *folders]):
        destination.mkdir(parents=True, exist_ok=True)
        write_costs(costs, destination)


def _finished(image_set: ImageSet, results: Results, overrides: Sequence[str]) -> Results:
    """Return the runs that reached the last step of their recipe."""
    arm_names = {name for name, _ in results}
    last = {
        arm.name: Run(image_set, arm, 0).config(Path(), overrides).training.max_steps
        for arm in ALL_ARMS
        if arm.name in arm_names
    }
    return {(name, seed): result for (name, seed), result in results.items() if result.step == last[name]}


def _available_metrics(results: Results) -> list[str]:
    return [metric for metric in METRICS if any(metric in result.metrics for result in results.values())]


def spread_table(results: Results) -> str:
    """Return a table of mean and standard deviation over seeds, and CPU seconds, for every arm."""
    first_result = next(iter(results.values()))
    metrics = _available_metrics(results)
    rows = [_spread_row(arm, results, metrics) for arm in ALL_ARMS if any(name == arm.name for name, _ in results)]
    head = ["arm", "seeds", *metrics, "training, CPU s", "evaluation, CPU s"]
    steps = ", ".join(str(step) for step in sorted({result.step for result in results.values()}))
    return f"{steps} steps, {first_result.images} validation images\n\n{markdown(head, rows)}"


def _spread_row(arm: Arm, results: Results, metrics: Sequence[str]) -> list[str]:
    arm_results = [result for (name, _), result in results.items() if name == arm.name]
    cells = [_mean_and_spread([r.metrics[metric] for r in arm_results if metric in r.metrics], 2) for metric in metrics]
    cpu_times = [result.cpu for result in arm_results if result.cpu is not None]
    seconds = [
        _mean_and_spread([cpu.training for cpu in cpu_times], 0),
        _mean_and_spread([c.evaluation for c in cpu_times], 0),
    ]
    return [arm.name, str(len(arm_results)), *cells, *seconds]


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Format values as `mean (standard deviation)`, one value as itself, and no value as `-`."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({statistics.stdev(values):.{digits}f})"


def difference_table(results: Results) -> str:
    """Return a table of the paired differences, intervals, verdicts and CPU ratios of all comparisons."""
    rows = [
        _difference_row(comparison, metric, difference, cpu_ratio(comparison, results))
        for comparison in COMPARISONS
        for metric in _available_metrics(results)
        if (difference := paired_difference(comparison, metric, results)) is not None
    ]
    head = ["arms", "metric", "seeds", "difference", "relative", "95 % interval", "verdict", "margin", "CPU s, ratio"]
    return markdown(head, rows) if rows else "No comparison has results of two seeds yet."


def _difference_row(comparison: Comparison, metric: str, difference: Difference, ratio: float | None) -> list[str]:
    value, low, high = difference.interval
    return [
        f"{comparison.arm} - {comparison.reference}",
        metric,
        str(difference.seeds),
        f"{value:+.2f}",
        "-" if difference.relative is None else f"{100 * difference.relative:+.1f} %",
        f"{low:+.2f} to {high:+.2f}",
        difference.verdict(comparison.margin) if difference.seeds >= JUDGED_SEEDS else "too few seeds",
        f"{comparison.margin:g}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
