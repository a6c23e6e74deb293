"""A comparison as plain text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from m2f.cluster.compare.compare import ClassTable, Comparison, Row, Value

TEXT_WIDTH = 120
"""Columns of a terminal: further runs go to another block, which repeats the baseline."""
SHOWN_CLASSES = 8
"""Largest gains and largest losses that text shows per run; HTML and JSON have all."""
VALUE_WIDTH = 14


def as_text(comparison: Comparison) -> str:
    """Tables for a terminal."""
    blocks = [_runs_text(comparison)]
    if comparison.notes:
        blocks.append("\n".join(f"! {note}" for note in comparison.notes))
    for rows, title in ((comparison.metrics, "metric"), (comparison.speed, "speed")):
        blocks += [
            aligned(_value_head(comparison, title, chosen), _value_rows(rows, chosen))
            for chosen in _chunks(comparison, rows)
        ]
    blocks += [text for table in comparison.classes for text in _class_text(comparison, table)]
    if comparison.differences:
        head = ["setting", *(run.name for run in comparison.runs)]
        blocks.append(aligned(head, [[d.setting, *map(setting_text, d.values)] for d in comparison.differences]))
    elif len(comparison.runs) > 1:
        blocks.append("The recipes do not differ.")
    return "\n\n".join(blocks) + "\n"


def as_markdown(comparison: Comparison, curves: str | None = None) -> str:
    """Tables for an issue or a wiki; `curves` is the path of a picture to show."""
    runs = [run.name for run in comparison.runs]
    everyone = range(len(runs))
    blocks = [f"# {title(comparison)}", "\n".join(f"- **{run.name}**: {run.source}" for run in comparison.runs)]
    if comparison.notes:
        blocks.append("\n".join(f"> {note}" for note in comparison.notes))
    blocks += [
        "## Metrics",
        _markdown_table(_value_head(comparison, "metric", everyone), _value_rows(comparison.metrics, everyone)),
    ]
    if curves is not None:
        blocks += ["## Curves", f"![Curves of training]({curves})"]
    if comparison.speed:
        rows = _value_rows(comparison.speed, everyone)
        blocks += ["## Speed and memory", _markdown_table(["measure", *_run_head(comparison, everyone)], rows)]
    for table in comparison.classes:
        rows = _value_rows(table.rows, everyone)
        blocks += [
            f"## {table.dataset}: {table.metric} by class",
            _markdown_table(["class", *_run_head(comparison, everyone)], rows),
        ]
    if comparison.differences:
        rows = [[d.setting, *map(setting_text, d.values)] for d in comparison.differences]
        blocks += ["## Recipe differences", _markdown_table(["setting", *runs], rows)]
    return "\n\n".join(blocks) + "\n"


def as_json(comparison: Comparison) -> str:
    """Everything, with full precision; null where a run has no value."""
    content = asdict(comparison)
    for run in content["runs"]:  # the plots have the curves that were compared, the tables the classes
        for name in ("curves", "results", "recipe"):
            del run[name]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def title(comparison: Comparison) -> str:
    """What is compared with what."""
    names = [run.name for run in comparison.runs]
    return names[0] if len(names) == 1 else f"{', '.join(names[1:])} against {names[0]}"


def value_text(value: Value) -> str:
    """`63.45 +1.20*`, with a space in the place of a missing star; `-` where the run has no value."""
    if value.value is None:
        return "- "
    delta = "" if value.delta is None else f" {value.delta:+.2f}"
    return f"{number_text(value.value)}{delta}{'*' if value.best else ' '}"


def number_text(value: float | None) -> str:
    """Two decimals, more for small numbers; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def setting_text(value: str | None) -> str:
    """A setting's value, or that the recipe does not have it."""
    return "(absent)" if value is None else value


def gains_and_losses(table: ClassTable, run: int) -> list[tuple[Row, float]]:
    """Rows with a delta of this run, the largest gain first."""
    found = [(row, row.values[run].delta) for row in table.rows]
    return sorted(((row, d) for row, d in found if d is not None), key=lambda pair: -pair[1])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [_line(row, widths) for row in (head, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _runs_text(comparison: Comparison) -> str:
    lines = [title(comparison) + (" (* the best)" if len(comparison.runs) > 1 else "")]
    for run in comparison.runs:
        about = ", ".join(part for part in (run.source, run.status, run.version and f"m2f {run.version}") if part)
        lines.append(f"  {run.name}: {about}")
    if comparison.paper is not None:
        lines.append(f"  paper: {comparison.paper.recipe}, Table {comparison.paper.table}")
    return "\n".join(lines)


def _value_head(comparison: Comparison, first: str, chosen: Sequence[int]) -> list[str]:
    return [
        first,
        *_run_head(comparison, chosen),
        *(["paper"] if _has_paper(comparison.metrics) and first == "metric" else []),
    ]


def _run_head(comparison: Comparison, chosen: Sequence[int]) -> list[str]:
    return [comparison.runs[position].name for position in chosen]


def _value_rows(rows: Sequence[Row], chosen: Sequence[int]) -> list[list[str]]:
    with_paper = _has_paper(rows)
    return [
        [row.name, *(value_text(row.values[i]) for i in chosen), *([number_text(row.paper)] if with_paper else [])]
        for row in rows
    ]


def _has_paper(rows: Sequence[Row]) -> bool:
    return any(row.paper is not None for row in rows)


def _chunks(comparison: Comparison, rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the runs that share a table: the baseline and as many others as fit; none for no rows."""
    if not rows:
        return []
    room = TEXT_WIDTH - max(len(row.name) for row in rows)
    widths = [max(VALUE_WIDTH, len(run.name)) + 2 for run in comparison.runs]
    chunks = [[0]]
    left = room - widths[0]
    for position in range(1, len(widths)):
        if widths[position] > left and len(chunks[-1]) > 1:
            chunks.append([0])
            left = room - widths[0]
        chunks[-1].append(position)
        left -= widths[position]
    return chunks


def _class_text(comparison: Comparison, table: ClassTable) -> list[str]:
    """The largest gains and losses of every run but the baseline."""
    blocks = []
    for position, run in enumerate(comparison.runs[1:], start=1):
        changes = gains_and_losses(table, position)
        shown = changes if len(changes) <= 2 * SHOWN_CLASSES else [*changes[:SHOWN_CLASSES], *changes[-SHOWN_CLASSES:]]
        if shown:
            head = [f"{table.dataset}: {table.metric} by class", comparison.runs[0].name, run.name, "delta"]
            rows = [
                [row.name, number_text(row.values[0].value), number_text(row.values[position].value), f"{delta:+.2f}"]
                for row, delta in shown
            ]
            if len(shown) < len(changes):
                rows.insert(SHOWN_CLASSES, [f"({len(changes) - len(shown)} between)", "", "", ""])
            blocks.append(aligned(head, rows))
    return blocks


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|---|" + "---:|" * (len(head) - 1), *map(line, rows)])
