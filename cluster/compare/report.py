"""Render a comparison as plain text, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from m2f.cluster.compare.compare import ClassTable, Comparison
from m2f.cluster.compare.tables import Number, Report, Table, build_report, largest_changes, number_text

TEXT_WIDTH = 120
"""Width of a table in characters. Runs that do not fit go into additional blocks, each with the baseline."""
SHOWN_CLASSES = 8
"""Number of largest gains, and of largest losses, that the text shows per run. Other formats contain all classes."""
VALUE_WIDTH = 14
"""Estimated width of a run's column in characters, unless the name of the run is longer."""


def as_text(comparison: Comparison) -> str:
    """Return the comparison as tables for a terminal."""
    report = build_report(comparison)
    blocks = [_runs(comparison, report)]
    if comparison.notes:
        blocks.append("\n".join(f"! {note}" for note in comparison.notes))
    blocks += _blocks(report.metrics, "metric", len(comparison.runs))
    if report.intervals.rows:
        blocks.append(align_columns(report.intervals.head, *report.intervals.rows))
    blocks += _blocks(report.speed, "speed", len(comparison.runs))
    for table, class_table in zip(report.classes, comparison.classes, strict=True):
        blocks += _class_blocks(table, class_table)
    if report.differences.rows:
        blocks.append(align_columns(report.differences.head, *report.differences.rows))
    elif len(comparison.runs) > 1:
        blocks.append("The recipes do not differ.")
    return "\n\n".join(blocks) + "\n"


def as_markdown(comparison: Comparison, curves: str | None = None) -> str:
    """Return the comparison as Markdown; `curves` is the path of an image to include."""
    report = build_report(comparison)
    blocks = [f"# {report.title}", "\n".join(f"- **{run.name}**: {run.source}" for run in comparison.runs)]
    if comparison.notes:
        blocks.append("\n".join(f"> {note}" for note in comparison.notes))
    blocks += _markdown(report.metrics)
    if curves is not None:
        blocks += ["## Curves", f"![Training curves]({curves})"]
    for table in (report.intervals, report.speed, *report.classes, report.differences):
        blocks += _markdown(table) if table.rows else []
    return "\n\n".join(blocks) + "\n"


def as_json(comparison: Comparison) -> str:
    """Return the comparison as JSON with full precision; missing and infinite values and NaN are null."""
    content = asdict(comparison)
    for run in content["runs"]:  # omit large fields, whose compared parts are elsewhere, and internal ones
        for name in ("curves", "results", "recipe", "images", "is_selected"):
            del run[name]
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a tree of values with None for infinite values and NaN, which a diverged loss has and JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def align_columns(*rows: Sequence[str | Number]) -> str:
    """Format rows as columns, the first one left-aligned and the others right-aligned. The first row is the header."""
    lines = [[*map(str, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([a.ljust(widths[0]), *map(str.rjust, b, widths[1:])]).rstrip() for a, *b in lines)


def _runs(comparison: Comparison, report: Report) -> str:
    lines = [report.title + (" (* = best)" if len(comparison.runs) > 1 else "")]
    for run in comparison.runs:
        details = ", ".join(part for part in (run.source, run.status, run.version and f"m2f {run.version}") if part)
        lines.append(f"  {run.name}: {details}")
    if report.paper is not None:
        lines.append(f"  paper: {report.paper}")
    return "\n".join(lines)


def _blocks(table: Table, first: str, num_runs: int) -> list[str]:
    """Split a table into blocks of about TEXT_WIDTH characters, each with the baseline, further runs and the paper.

    A table without rows has no blocks.
    """
    if not table.rows:
        return []
    widths = [max(VALUE_WIDTH, len(name)) + 2 for name in table.head]
    available = TEXT_WIDTH - max(len(str(row[0])) for row in table.rows)
    paper = range(num_runs + 1, len(table.head))
    chunks: list[list[int]] = [[1]]
    for column in range(2, num_runs + 1):
        if len(chunks[-1]) > 1 and sum(widths[c] for c in (*chunks[-1], column, *paper)) > available:
            chunks.append([1])
        chunks[-1].append(column)
    rows = [(first, *table.head[1:]), *table.rows]
    return [align_columns(*([row[c] for c in (0, *chunk, *paper)] for row in rows)) for chunk in chunks]


def _class_blocks(table: Table, class_table: ClassTable) -> list[str]:
    """Return one table with the largest gains and losses for every run except the baseline."""
    blocks = []
    for run in range(1, len(table.head) - 1):
        changes, left_out = largest_changes(class_table, run, SHOWN_CLASSES)
        rows = [
            [row.name, number_text(row.values[0].value), number_text(row.values[run].value), f"{delta:+.2f}"]
            for row, delta in changes
        ]
        if left_out:
            rows.insert(SHOWN_CLASSES, [f"({left_out} more)", "", "", ""])
        if rows:
            blocks.append(align_columns([table.title, table.head[1], table.head[1 + run], "delta"], *rows))
    return blocks


def _markdown(table: Table) -> list[str]:
    """Return a heading and the table as Markdown."""

    def line(cells: Sequence[str | Number]) -> str:
        texts = (str(cell).strip().replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(texts)} |"

    rule = "|---|" + "---:|" * (len(table.head) - 1)
    return [f"## {table.title}", "\n".join([line(table.head), rule, *map(line, table.rows)])]
