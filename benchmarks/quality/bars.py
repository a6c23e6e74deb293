"""Criteria (bars) that a setting must meet before recipes use it, with the runs that they need and their verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.arms import IMAGE_SETS, JUDGED_SEEDS, PILOT_ARMS, Comparison
from benchmarks.quality.differences import Difference, Results, cpu_ratio, paired_difference
from benchmarks.quality.point_costs import Costs

MIN_SMALL_GAIN = 0.2
"""Minimum relative gain in AP of small objects that box points must reach."""
UNIFORM_MARGIN = 1.5
"""Number of PQ points by which 1024 box points may fall below 8192 uniform points."""
MAX_COST = 0.35
"""Maximum CPU time of matching and losses with 1024 box points, as a share of that with 8192 uniform points."""
MAX_PILOT_COST = 0.7
"""Maximum CPU time in which pilots must reach the same PQ, as a share of the base's CPU time for 2,500 steps."""
_BOX_ARMS = ("box_matching", "box_points")
_UNIFORM = "uniform_8192"


@dataclass(frozen=True)
class Bar:
    """A criterion for one metric of a comparison on an image set, over the judged seeds."""

    image_set: str
    comparison: Comparison
    metric: str
    min_gain: float | None = None
    """Minimum gain as a share of the reference; None if `no loss` suffices."""
    max_cost: float | None = None
    """Maximum CPU time of training, as a share of the reference's; None for no limit."""

    def __str__(self) -> str:
        required = "no loss" if self.min_gain is None else f"a gain of at least {100 * self.min_gain:g} %"
        margin_text = f" (margin {self.comparison.margin:g})" if self.min_gain is None else ""
        pair = f"{self.comparison.arm} against {self.comparison.reference}"
        cost = "" if self.max_cost is None else f", in at most {self.max_cost:g} of the CPU seconds"
        return f"{pair} on {self.image_set}: {required} in {self.metric}{margin_text}{cost}"


_BOX_BARS = tuple(
    bar
    for arm in _BOX_ARMS
    for bar in (
        Bar("shapes", Comparison(arm, _UNIFORM, UNIFORM_MARGIN), "PQ"),
        Bar("small_shapes", Comparison(arm, "base"), "APs", MIN_SMALL_GAIN),
        Bar("small_shapes", Comparison(arm, "base"), "APm"),
        # Two bars, because the class averages of medium and large objects cannot be combined into one.
        Bar("small_shapes", Comparison(arm, "base"), "PQ_medium"),
        Bar("small_shapes", Comparison(arm, "base"), "PQ_large"),
    )
)
BARS = (*_BOX_BARS, Bar("shapes", Comparison("pilots_1500", "base_2500"), "PQ", max_cost=MAX_PILOT_COST))


@dataclass(frozen=True)
class Part:
    """Runs that are reported together."""

    name: str
    image_set: str
    arms: tuple[str, ...]
    seeds: int


_POINTS = ("base", *_BOX_ARMS, _UNIFORM)
PARTS = (
    *(Part("box points", image_set.name, _POINTS, image_set.seeds) for image_set in IMAGE_SETS),
    Part("beside transformers", "shapes", ("base", "transformers"), 2),
    Part("beside transformers", "camvid", ("base", "transformers"), 2),
    Part("pilots", "shapes", ("base", *(arm.name for arm in PILOT_ARMS)), JUDGED_SEEDS),
)


def judge(bar: Bar, results: Results) -> str:
    """Return a line with the verdict (`holds`, `FAILS` or `not decided`), the bar, and the result or missing runs."""
    needed = [(arm, seed) for arm in (bar.comparison.arm, bar.comparison.reference) for seed in range(JUDGED_SEEDS)]
    if missing := [key for key in needed if key not in results]:
        return f"FAILS: {bar}: not run: {_format_runs(missing)}"
    difference = paired_difference(bar.comparison, bar.metric, results)
    if difference is None:
        return f"FAILS: {bar}: the results have no {bar.metric}"
    value, low, high = difference.interval
    relative = "" if difference.relative is None else f", {100 * difference.relative:+.1f} %"
    verdict, cost = _verdict(bar, difference), ""
    if bar.max_cost is not None:
        ratio = cpu_ratio(bar.comparison, results)
        verdict = verdict if ratio is not None and ratio <= bar.max_cost else "FAILS"
        cost = f", {'unknown' if ratio is None else f'{ratio:.2f}'} of the CPU seconds"
    return f"{verdict}: {bar}: {value:+.2f} ({low:+.2f} to {high:+.2f}){relative}{cost}"


def _verdict(bar: Bar, difference: Difference) -> str:
    verdict = difference.verdict(bar.comparison.margin)
    if bar.min_gain is None:
        return {"gain": "holds", "no loss": "holds", "loss": "FAILS"}.get(verdict, verdict)
    is_large_enough = difference.relative is not None and difference.relative >= bar.min_gain
    if not is_large_enough:
        return "FAILS"
    return "holds" if verdict == "gain" else "not decided"


def judge_costs(costs: Iterable[Costs]) -> list[str]:
    """Return a verdict on the cost of box points for every measured micro-batch."""
    lines = []
    for cost in costs:
        for arm in _BOX_ARMS:
            ratio = cost.milliseconds[arm] / cost.milliseconds[_UNIFORM]
            verdict = "holds" if ratio <= MAX_COST else "FAILS"
            claim = f"{arm} takes at most {MAX_COST:g} of the CPU time of {_UNIFORM} in matching and losses"
            lines.append(f"{verdict}: {claim} ({cost.sizes}): {ratio:.2f}")
    return lines


def missing_runs(part: Part, results: Results) -> str | None:
    """Return a line that lists the missing runs of a part; None if it is complete."""
    missing = [(arm, seed) for arm in part.arms for seed in range(part.seeds) if (arm, seed) not in results]
    if not missing:
        return None
    total = len(part.arms) * part.seeds
    progress = f"{total - len(missing)} of {total} runs are finished"
    return f"FAILS: {part.name} on {part.image_set}: {progress}; missing: {_format_runs(missing)}"


def report_lines(results: Mapping[str, Results], costs: Sequence[Costs]) -> list[str]:
    """Return lines for all incomplete parts, bars and costs. `results` are finished runs by image set."""
    missing_lines = [line for part in PARTS if (line := missing_runs(part, results[part.image_set])) is not None]
    verdicts = [judge(bar, results[bar.image_set]) for bar in BARS]
    return [*missing_lines, *verdicts, *(judge_costs(costs) or ["FAILS: cost of points: not measured"])]


def _format_runs(runs: Sequence[tuple[str, int]]) -> str:
    """Format arms and seeds, for example `base 0-2, box_points 0 3`."""
    arms = dict.fromkeys(arm for arm, _ in runs)
    return ", ".join(f"{arm} {_format_seeds([seed for name, seed in runs if name == arm])}" for arm in arms)


def _format_seeds(seeds: Sequence[int]) -> str:
    """Format ascending numbers; consecutive ones become a range."""
    starts = [seed for seed in seeds if seed - 1 not in seeds]
    ends = [seed for seed in seeds if seed + 1 not in seeds]
    return " ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))
