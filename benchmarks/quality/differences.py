"""Compute differences between arms over seeds, and verdicts on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.arms import ALL_ARMS, Comparison, ImageSet, Run
from benchmarks.quality.finished_runs import RunResult, read_run
from m2f.eval.metrics.seed_interval import SeedInterval, mean_interval

MAX_SEEDS = 100
"""Results are looked up for seeds below this number, which no series of runs reaches."""

Results = Mapping[tuple[str, int], RunResult]
"""Evaluated runs of one image set by arm and seed."""


def read_results(folders: Sequence[Path], image_set: ImageSet) -> Results:
    """Return the runs that reached the last step of any run of their arm."""
    results = {
        (arm.name, seed): result
        for arm in ALL_ARMS
        for seed in range(MAX_SEEDS)
        if (result := read_run(folders, Run(image_set, arm, seed))) is not None
    }
    last = {arm: max(result.step for (name, _), result in results.items() if name == arm) for arm, _ in results}
    return {(arm, seed): result for (arm, seed), result in results.items() if result.step == last[arm]}


@dataclass(frozen=True)
class Difference:
    """Difference in one metric between two arms, over the seeds that both have."""

    seeds: int
    interval: SeedInterval
    """95 % Student's t interval of the mean of the paired differences."""
    reference: float
    """Mean value of the reference arm over these seeds."""

    @property
    def relative(self) -> float | None:
        """Mean difference as a share of `reference`; None if that is 0."""
        return self.interval.value / self.reference if self.reference else None

    def verdict(self, margin: float) -> str:
        """Return `gain`, `no loss` (worse by less than `margin`), `loss` or `not decided`, from the interval."""
        if self.interval.low > 0:
            return "gain"
        if self.interval.low > -margin:
            return "no loss"
        return "loss" if self.interval.high < 0 else "not decided"


def paired_difference(comparison: Comparison, metric: str, results: Results) -> Difference | None:
    """Return the difference in a metric; None if the arms share fewer than two seeds."""
    sides = [
        {seed: r.metrics[metric] for (name, seed), r in results.items() if name == arm and metric in r.metrics}
        for arm in (comparison.arm, comparison.reference)
    ]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if len(shared) < 2:
        return None
    differences = [sides[0][seed] - sides[1][seed] for seed in shared]
    reference = statistics.fmean(sides[1][seed] for seed in shared)
    return Difference(len(differences), mean_interval(differences), reference)


def cpu_ratio(comparison: Comparison, results: Results) -> float | None:
    """Return the ratio of CPU seconds of training over the seeds that both arms have; None if there are none."""
    sides = [
        {seed: r.cpu.training for (name, seed), r in results.items() if name == arm and r.cpu is not None}
        for arm in (comparison.arm, comparison.reference)
    ]
    shared = sides[0].keys() & sides[1].keys()
    return sum(sides[0][s] for s in shared) / sum(sides[1][s] for s in shared) if shared else None
