"""Tables of a comparison with formatted cells, shared by the reports in plain text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2f.cluster.compare.compare import ClassTable, Comparison, RunValues, Value


@dataclass(frozen=True)
class Number:
    """Formatted number of one run."""

    text: str
    delta: str = ""
    """Signed difference from the baseline; "" if there is none."""
    gain: float = 0.0
    """Above 0 if the run is better than the baseline, below 0 if it is worse."""
    best: bool = False

    def __str__(self) -> str:
        """Return text such as `63.45 +1.20*`; a space replaces the star if the value is not the best."""
        return f"{self.text}{self.delta and ' ' + self.delta}{'*' if self.best else ' '}"


@dataclass(frozen=True)
class Table:
    """A table of a report. Most have a name column, a column per run, and a column for the paper's numbers, if any."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Number, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of a report in every format. Tables may have no rows."""

    title: str
    """Names of the compared runs."""
    paper: str | None
    """Recipe and table of the paper from which the paper's column comes; None without such a column."""
    metrics: Table
    intervals: Table
    speed: Table
    classes: tuple[Table, ...]
    """Tables of classes, in the order of the comparison."""
    differences: Table


def build_report(comparison: Comparison) -> Report:
    """Build the tables of a comparison."""
    names = [run.name for run in comparison.runs]
    paper = comparison.paper
    settings = (
        (d.setting, *("(absent)" if value is None else value for value in d.values)) for d in comparison.differences
    )
    return Report(
        title=names[0] if len(names) == 1 else f"{', '.join(names[1:])} against {names[0]}",
        paper=None if paper is None else f"{paper.recipe}, Table {paper.table}",
        metrics=_table("Metrics", "metric", names, comparison.metrics),
        intervals=_interval_table(comparison),
        speed=_table("Speed and memory", "measure", names, comparison.speed),
        classes=tuple(
            _table(f"{classes.dataset}: {classes.metric} by class", "class", names, classes.rows)
            for classes in comparison.classes
        ),
        differences=Table("Recipe differences", ("setting", *names), tuple(settings)),
    )


def _interval_table(comparison: Comparison) -> Table:
    head = ("metric", "runs", "value", "95 % interval", "computed over")
    rows = []
    for interval in comparison.intervals:
        value = f"{interval.value:.2f}" if interval.baseline is None else f"{interval.value:+.2f}"
        estimate = f"{interval.run}, mean" if interval.baseline is None else f"{interval.run} - {interval.baseline}"
        sample = (
            f"{interval.images:,} images"
            if interval.kind == "images"
            else f"{' and '.join(map(str, interval.runs))} seeds"
        )
        rows.append((interval.metric, estimate, value, f"{interval.low:.2f} to {interval.high:.2f}", sample))
    return Table("Intervals", head, tuple(rows))


def _table(title: str, first: str, names: Sequence[str], rows: Sequence[RunValues]) -> Table:
    published = any(row.paper is not None for row in rows)
    lines = [
        (row.name, *(_number(value, row) for value in row.values), *([number_text(row.paper)] if published else []))
        for row in rows
    ]
    return Table(title, (first, *names, *(["paper"] if published else [])), tuple(lines))


def _number(value: Value, row: RunValues) -> Number:
    text = number_text(value.value)
    if value.delta is None:
        return Number(text, best=value.best)
    return Number(text, f"{value.delta:+.2f}", value.delta if row.higher_is_better else -value.delta, value.best)


def number_text(value: float | None) -> str:
    """Format a number with two decimals, or two significant digits if it is below 0.1. None becomes `-`."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def largest_changes(table: ClassTable, run: int, count: int) -> tuple[list[tuple[RunValues, float]], int]:
    """Return the `count` largest gains and `count` largest losses of the run at position `run`, best first.

    Also return the number of omitted changes between them.
    """
    deltas = [(row, row.values[run].delta) for row in table.rows]
    changes = sorted(((row, delta) for row, delta in deltas if delta is not None), key=lambda change: -change[1])
    left_out = max(0, len(changes) - 2 * count)
    return [*changes[:count], *changes[count + left_out :]], left_out
