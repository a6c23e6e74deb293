"""`python -m benchmarks.quality.make_tables FOLDER`: every table of a comparison, from its run folders, as Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.arms import ARMS, COMPARISONS, IMAGE_SETS, METRICS, Arm, Comparison, ImageSet, Run
from benchmarks.quality.finished_runs import RunResult, read_run
from m2f.cluster.terminal import print_out
from m2f.eval.metrics.seed_interval import SeedInterval, mean_interval

MAX_SEEDS = 100

Results = Mapping[tuple[str, int], RunResult]
"""Finished runs of one image set by arm and seed."""


def main(folder: Path) -> None:
    """Print the tables of every image set with finished runs."""
    for image_set in IMAGE_SETS:
        if results := read_results(folder, image_set):
            print_out("\n\n".join((f"## {image_set.name}", spread_table(results), difference_table(results), "")))


def read_results(folder: Path, image_set: ImageSet) -> Results:
    """Runs that reached the last step that any run of the set has reached."""
    found = {
        (arm.name, seed): result
        for arm in ARMS
        for seed in range(MAX_SEEDS)
        if (result := read_run(folder, Run(image_set, arm, seed))) is not None
    }
    last = max((result.step for result in found.values()), default=0)
    return {key: result for key, result in found.items() if result.step == last}


def spread_table(results: Results) -> str:
    """Mean and standard deviation over the seeds of every arm, and CPU seconds."""
    some = next(iter(results.values()))
    rows = [_spread_row(arm, results) for arm in ARMS if any(name == arm.name for name, _ in results)]
    head = ["arm", "seeds", *METRICS, "training, CPU s", "evaluation, CPU s"]
    return f"{some.step} steps, {some.images} validation images\n\n{markdown(head, rows)}"


def _spread_row(arm: Arm, results: Results) -> list[str]:
    own = [result for (name, _), result in results.items() if name == arm.name]
    cells = [_mean_and_spread([r.metrics[metric] for r in own if metric in r.metrics], 2) for metric in METRICS]
    known = [result.cpu for result in own if result.cpu is not None]
    seconds = [_mean_and_spread([cpu.training for cpu in known], 0), _mean_and_spread([c.evaluation for c in known], 0)]
    return [arm.name, str(len(own)), *cells, *seconds]


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    """`mean (standard deviation)`."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({statistics.stdev(values):.{digits}f})"


@dataclass(frozen=True)
class Difference:
    """Of one metric, between runs of the same seeds."""

    seeds: int
    interval: SeedInterval
    """95 % Student's t interval of the mean of the paired differences."""

    def verdict(self, margin: float) -> str:
        """`gain`, `no loss` (not worse by as much as `margin`), `loss` or `not decided`."""
        if self.interval.low > 0:
            return "gain"
        if self.interval.low > -margin:
            return "no loss"
        return "loss" if self.interval.high < 0 else "not decided"


def paired_difference(comparison: Comparison, metric: str, results: Results) -> Difference | None:
    """None with fewer than two seeds that both arms have."""
    sides = [
        {seed: r.metrics[metric] for (name, seed), r in results.items() if name == arm and metric in r.metrics}
        for arm in (comparison.arm, comparison.reference)
    ]
    differences = [sides[0][seed] - sides[1][seed] for seed in sorted(sides[0].keys() & sides[1].keys())]
    return Difference(len(differences), mean_interval(differences)) if len(differences) > 1 else None


def difference_table(results: Results) -> str:
    """Paired differences of all comparisons with their intervals and verdicts, and the ratio of CPU seconds."""
    rows = []
    for comparison in COMPARISONS:
        ratio = cpu_ratio(comparison, results)
        for metric in METRICS:
            if (found := paired_difference(comparison, metric, results)) is not None:
                value, low, high = found.interval
                pair = f"{comparison.arm} - {comparison.reference}"
                numbers = [f"{value:+.2f}", f"{low:+.2f} to {high:+.2f}", found.verdict(comparison.margin)]
                rows.append([pair, metric, str(found.seeds), *numbers, f"{comparison.margin:g}", ratio])
    head = ["arms", "metric", "seeds", "difference", "95 % interval", "verdict", "margin", "training CPU s, ratio"]
    return markdown(head, rows) if rows else "No comparison has two seeds yet."


def cpu_ratio(comparison: Comparison, results: Results) -> str:
    """Of the means over the seeds that both arms have."""
    sides = [
        {seed: r.cpu.training for (name, seed), r in results.items() if name == arm and r.cpu is not None}
        for arm in (comparison.arm, comparison.reference)
    ]
    shared = sides[0].keys() & sides[1].keys()
    return f"{sum(sides[0][s] for s in shared) / sum(sides[1][s] for s in shared):.2f}" if shared else "-"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
