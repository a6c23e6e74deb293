"""Render a comparison as an HTML page."""

from __future__ import annotations

from collections.abc import Collection
from html import escape

from m2f.cluster.compare.compare import ClassTable, Comparison, Plot
from m2f.cluster.compare.tables import Number, Report, Table, build_report, largest_changes
from m2f.eval.report.charts import BAD, GOOD, Bar, Series, bar_chart, line_chart
from m2f.eval.report.page import Cell, Section, collapsible, grid, page, paragraph, table
from m2f.model.format_count import format_count

SHOWN_CLASSES = 20
"""Number of largest gains, and of largest losses, in a chart. The table below the chart contains all classes."""


def as_page(comparison: Comparison) -> str:
    """Return the page as one self-contained HTML file."""
    report = build_report(comparison)
    differences, names = report.differences, [run.name for run in comparison.runs]
    steps = [
        [f"step of {name}", *("-" if s is None else f"{s:,}" for s in steps)]
        for name, steps in comparison.steps.items()
    ]
    paper = "" if report.paper is None else paragraph(f"Paper: {report.paper}.", "faint")
    sections = [Section("Metrics", _table(report.metrics) + paper + table(["evaluated", *names], steps))]
    if report.intervals.rows:
        sections.append(Section("Intervals", _table(report.intervals, texts=[1])))
    if comparison.plots:
        sections.append(Section("Curves", grid([plot_svg(p, comparison) for p in comparison.plots])))
    if comparison.classes:
        sections.append(Section("Classes", _classes(comparison, report)))
    lead = "".join(paragraph(note, "note") for note in comparison.notes)
    if len(names) > 1:
        lead = paragraph(f"Differences are relative to {names[0]}; the best value of a row is bold.", "faint") + lead
        texts = range(1, len(differences.head))
        body = _table(differences, texts) if differences.rows else paragraph("The recipes do not differ.")
        sections.append(Section(differences.title, body))
    if report.speed.rows:
        sections.append(Section(report.speed.title, _table(report.speed)))
    runs = tuple((run.name, run.source, run.status or "-", run.version or "-") for run in comparison.runs)
    sections.append(Section("Runs", _table(Table("Runs", ("run", "where", "status", "m2f"), runs), texts=[1])))
    return page(report.title, lead, sections)


def plot_svg(plot: Plot, comparison: Comparison) -> str:
    """Return the curves of one metric as SVG."""
    series = [Series(run.name, curve) for run, curve in zip(comparison.runs, plot.curves, strict=True)]
    return line_chart(plot.metric, series, plot.x_label)


def _table(content: Table, texts: Collection[int] = ()) -> str:
    """Return a table as HTML. `texts` holds the positions of columns with free text."""
    return table(
        content.head,
        [[_cell(cell, "text" if i in texts else "") for i, cell in enumerate(row)] for row in content.rows],
    )


def _cell(cell: str | Number, kind: str) -> Cell:
    if isinstance(cell, str):
        return Cell(escape(cell), kind)
    meaning = "good" if cell.gain > 0 else "bad" if cell.gain < 0 else "faint"
    delta = f' <span class="{meaning}">{cell.delta}</span>' if cell.delta else ""
    return Cell(escape(cell.text) + delta, "best" if cell.best else "")


def _classes(comparison: Comparison, report: Report) -> str:
    """Return charts of gains and losses, and collapsed tables of all classes."""
    others = list(enumerate(comparison.runs))[1:]
    charts = [_change_chart(classes, position, run.name) for classes in comparison.classes for position, run in others]
    tables = [
        collapsible(
            f"{classes.dataset}/{classes.metric} for {format_count(len(classes.rows), 'class', 'classes')}",
            _table(content),
        )
        for classes, content in zip(comparison.classes, report.classes, strict=True)
    ]
    return grid([chart for chart in charts if chart]) + "".join(tables)


def _change_chart(classes: ClassTable, position: int, name: str) -> str:
    """Return a chart of the gains and losses of one run, or "" if no class can be compared."""
    changes, _ = largest_changes(classes, position, SHOWN_CLASSES)
    bars = [Bar(row.name, delta, f"{delta:+.1f}", GOOD if delta >= 0 else BAD) for row, delta in changes]
    return bar_chart(f"{classes.dataset}/{classes.metric}: {name}", bars) if bars else ""
