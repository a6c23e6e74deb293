"""A comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from m2f.cluster.compare.compare import ClassTable, Comparison, Plot, Row, Value
from m2f.cluster.compare.report import gains_and_losses, number_text, setting_text, title
from m2f.eval.report.charts import BAD, GOOD, Bar, Series, bar_chart, line_chart
from m2f.eval.report.page import Cell, Section, folded, grid, page, paragraph, table

SHOWN_CLASSES = 20
"""Largest gains and largest losses that a chart shows; the table below it has all classes."""


def as_page(comparison: Comparison) -> str:
    """The whole page, with everything inside."""
    sections = [Section("Metrics", _metrics(comparison))]
    if comparison.plots:
        sections.append(Section("Curves", grid([plot_svg(p, comparison) for p in comparison.plots])))
    if comparison.classes:
        sections.append(Section("Classes", _classes(comparison)))
    if len(comparison.runs) > 1:
        sections.append(Section("Recipe differences", _differences(comparison)))
    if comparison.speed:
        sections.append(Section("Speed and memory", _value_table("measure", comparison, comparison.speed)))
    sections.append(Section("Runs", _runs(comparison)))
    lead = "".join(paragraph(note, "note") for note in comparison.notes)
    if len(comparison.runs) > 1:
        lead = (
            paragraph(f"Differences are to {comparison.runs[0].name}; the best value of a row is bold.", "faint") + lead
        )
    return page(title(comparison), lead, sections)


def plot_svg(plot: Plot, comparison: Comparison) -> str:
    """The curves of one metric."""
    series = [Series(run.name, curve) for run, curve in zip(comparison.runs, plot.curves, strict=True)]
    return line_chart(plot.metric, series, plot.x_label)


def _metrics(comparison: Comparison) -> str:
    html = _value_table("metric", comparison, comparison.metrics)
    steps = [
        [f"step of {dataset}", *("-" if at is None else f"{at:,}" for at in steps)]
        for dataset, steps in comparison.steps.items()
    ]
    if comparison.paper is not None:
        html += paragraph(f"Paper: {comparison.paper.recipe}, Table {comparison.paper.table}.", "faint")
    return html + table(["evaluated", *(run.name for run in comparison.runs)], steps)


def _value_table(first: str, comparison: Comparison, rows: Sequence[Row]) -> str:
    with_paper = any(row.paper is not None for row in rows)
    head = [first, *(run.name for run in comparison.runs), *(["paper"] if with_paper else [])]
    lines: list[list[str | Cell]] = []
    for row in rows:
        line: list[str | Cell] = [row.name, *(_value(value, row.higher_is_better) for value in row.values)]
        lines.append([*line, number_text(row.paper)] if with_paper else line)
    return table(head, lines)


def _value(value: Value, higher_is_better: bool) -> Cell:
    html = escape(number_text(value.value))
    if value.delta is not None:
        gain = value.delta if higher_is_better else -value.delta
        kind = "good" if gain > 0 else "bad" if gain < 0 else "faint"
        html += f' <span class="{kind}">{value.delta:+.2f}</span>'
    return Cell(html, "best" if value.best else "")


def _classes(comparison: Comparison) -> str:
    """Gains and losses as charts, and every class in tables that open on a click."""
    others = list(enumerate(comparison.runs))[1:]
    charts = [_change_chart(one, position, run.name) for one in comparison.classes for position, run in others]
    tables = [
        folded(f"{one.dataset}/{one.metric} of {len(one.rows)} classes", _value_table("class", comparison, one.rows))
        for one in comparison.classes
    ]
    return grid([chart for chart in charts if chart]) + "".join(tables)


def _change_chart(one: ClassTable, position: int, name: str) -> str:
    """Gains and losses of one run; "" where no class can be compared."""
    changes = gains_and_losses(one, position)
    if len(changes) > 2 * SHOWN_CLASSES:
        changes = [*changes[:SHOWN_CLASSES], *changes[-SHOWN_CLASSES:]]
    bars = [Bar(row.name, delta, f"{delta:+.1f}", GOOD if delta >= 0 else BAD) for row, delta in changes]
    return bar_chart(f"{one.dataset}/{one.metric}: {name}", bars) if bars else ""


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return paragraph("The recipes do not differ.")
    head = ["setting", *(run.name for run in comparison.runs)]
    rows = [
        [d.setting, *(Cell(escape(setting_text(value)), "word") for value in d.values)] for d in comparison.differences
    ]
    return table(head, rows)


def _runs(comparison: Comparison) -> str:
    rows = [
        [run.name, Cell(escape(run.source), "word"), run.status or "-", run.version or "-"] for run in comparison.runs
    ]
    return table(["run", "where", "status", "m2f"], rows)
