"""HTML page of one evaluation: metrics, classes, errors, confusion, precision and recall, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from m2f.data_pipeline.categories import Task
from m2f.eval.metrics.segment_errors import SIZES, Outcome, SegmentErrors
from m2f.eval.report.charts import BAD, GOOD, Bar, bar_chart, matrix_chart
from m2f.eval.report.error_costs import error_costs
from m2f.eval.report.page import Cell, Section, collapsible, grid, headline, page, paragraph, picture, table
from m2f.eval.report.panels import decode_picture, encode_jpeg
from m2f.eval.report.precision_recall import curves_by_class, curves_by_size, precision_recall, precision_recall_charts
from m2f.eval.results.results import EvaluationResults, distinct_names

CHART_CLASSES = 40
"""Largest number of classes in a bar chart. If there are more, the worst ones are shown."""
MATRIX_CLASSES = 30
"""Largest number of classes in a confusion matrix. If there are more, those with the most errors are shown."""
TOP_CONFUSIONS = 15
"""Number of rows in the table of confused classes."""
PICTURE_WIDTH = 1500
"""Largest width of a picture in pixels. All pictures are in the file of the page, which would become too large."""
NO_PARTNER = "(none)"

OUTCOME_TEXTS = {
    Outcome.MATCHED: ("found", "right class, IoU above 0.5"),
    Outcome.OUTLINE: ("bad outline", "right class, IoU from 0.1 to 0.5"),
    Outcome.CLASS: ("wrong class", "another class, IoU above 0.5"),
    Outcome.MISSED: ("missed", "annotated segment without a paired prediction"),
    Outcome.DUPLICATE: ("duplicate", "mostly inside segments of its class that are already paired"),
    Outcome.BACKGROUND: ("invented", "prediction without a paired annotated segment"),
}


def evaluation_page(results: EvaluationResults, panels: Mapping[int, bytes], worst: Mapping[int, bytes]) -> str:
    """Return the self-contained HTML page.

    `panels` and `worst` hold PNG files by image id. Panels are shown in ascending id, `worst` in the given order.
    """
    sections = [Section("Metrics", _metrics(results)), Section("Classes", _classes(results))]
    if results.segments is not None:
        costs = "" if results.errors is None else error_costs(results.errors)
        sections.append(Section("Errors", costs + _errors(results, results.segments)))
    confusion = _confusion(results)
    if confusion:
        sections.append(Section("Confusion", confusion))
    curves = precision_recall(results)
    if curves is not None:
        sections.append(Section("Precision and recall", precision_recall_charts(results, curves)))
    if worst:
        lead = paragraph("The evaluated images with the lowest quality, worst first.", "faint")
        sections.append(Section("Worst images", lead + _pictures(worst)))
    if panels:
        lead = paragraph("The same images in every evaluation: image, truth, prediction.", "faint")
        sections.append(Section("Images", lead + _pictures({i: panels[i] for i in sorted(panels)})))
    subject = results.subject
    step = "" if subject.step is None else f" at step {subject.step:,}"
    data = f", data {subject.fingerprint[:12]}" if subject.fingerprint else ""
    scope = (
        ("Test time: {}.", subject.test_time),
        ("Subset: {}. Not comparable with results of the whole set.", subject.subset),
        ("Some classes: {}.", subject.classes),
    )
    notes = [text.format(value) for text, value in scope if value is not None]
    lead = "".join(paragraph(note, "note") for note in (*notes, *results.notes))
    lead += paragraph(f"{results.num_images:,} images{data}; all values in per cent.", "faint")
    metrics = results.metrics()
    chosen = {name: _number(metrics[name]) for name in ("PQ", "AP", "mIoU") if name in metrics}
    return page(f"{subject.label}{step}", headline(chosen) + lead, sections)


def details_json(results: EvaluationResults) -> str:
    """Return the data of the page's charts and matrices as JSON: errors, confusion, and precision-recall curves."""
    content: dict[str, Any] = {"precision_recall": precision_recall(results)}
    if results.instance is not None:
        names = _class_names(results, "instance")
        by_class = zip(names, curves_by_class(results.instance), strict=True)
        content["precision_recall_by_size"] = curves_by_size(results.instance)
        content["precision_recall_by_class"] = {name: curves for name, curves in by_class if curves is not None}
    if results.segments is not None:
        outcomes = [OUTCOME_TEXTS[outcome][0] for outcome in Outcome]
        names = [*_segment_names(results), NO_PARTNER]
        content["segments"] = {
            "outcomes": dict(zip(outcomes, results.segments.by_class.sum(axis=0).tolist(), strict=True)),
            "by_size": _counts_by_name(list(SIZES), outcomes, results.segments.by_size),
            "by_class": _counts_by_name(names[:-1], outcomes, results.segments.by_class),
            "confusion": [[names[t], names[p], n] for t, p, n in _cells(results.segments.confusion)],
        }
    if results.errors is not None:
        content["error_types"] = {
            "metric": results.errors.metric,
            "value": results.errors.value,
            "gains": dict(results.errors.gains),
            "counts": dict(results.errors.counts),
        }
    if results.pixels is not None:
        names = _class_names(results, "semantic")
        content["pixels"] = {"confusion": [[names[t], names[p], n] for t, p, n in _cells(results.pixels)]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def to_jpeg(png: bytes) -> bytes:
    """Convert a PNG file to a JPEG of at most PICTURE_WIDTH pixels in width, so that pages stay small."""
    image = decode_picture(png)
    height, width = image.shape[:2]
    if width > PICTURE_WIDTH:
        image = cv2.resize(image, (PICTURE_WIDTH, round(height * PICTURE_WIDTH / width)), interpolation=cv2.INTER_AREA)
    return encode_jpeg(image)


def _metrics(results: EvaluationResults) -> str:
    metrics = results.metrics()
    blocks = []
    if results.panoptic is not None:
        splits = (("all", ""), ("things", "_th"), ("stuff", "_st"))
        rows = [[split, *(_number(metrics[name + suffix]) for name in ("PQ", "SQ", "RQ"))] for split, suffix in splits]
        blocks.append(table(["panoptic", "PQ", "SQ", "RQ"], rows))
        if sizes := [f"PQ_{size}" for size in results.panoptic.by_size]:
            blocks.append(_single_row_table(metrics, sizes))
    if results.instance is not None:
        blocks.append(_single_row_table(metrics, list(results.instance.stats)))
    if results.semantic is not None:
        blocks.append(
            _single_row_table(metrics, [name for name in metrics if name.startswith(("mIoU", "fwIoU", "mACC", "pACC"))])
        )
    for group in results.extra.groups():
        row = [_number(value) for value in group.numbers.values()]
        blocks.append(table([group.title, *group.numbers], [["", *row]]))
    return "".join(blocks)


def _single_row_table(metrics: Mapping[str, float | None], names: Sequence[str]) -> str:
    return table(names, [[_number(metrics[name]) for name in names]])


def _classes(results: EvaluationResults) -> str:
    """Return one chart per metric, with the worst classes last, and the complete table."""
    rows = results.per_class()
    charts = []
    for metric in ("PQ", "AP", "IoU"):
        values = [(row["name"], row[metric]) for row in rows if row.get(metric) is not None]
        if values:
            shown = sorted(values, key=lambda pair: -pair[1])[-CHART_CLASSES:]
            name = f"{metric} by class" if len(shown) == len(values) else f"{metric}: the {len(shown)} worst classes"
            bars = [Bar(class_name, value, f"{value:.1f}") for class_name, value in shown]
            charts.append(bar_chart(name, bars, limits=(0.0, 100.0)))
    names = [name for name in rows[0] if name not in ("id", "name", "is_thing")]
    lines = [[r["name"], "thing" if r["is_thing"] else "stuff", *(_number(r[n]) for n in names)] for r in rows]
    return grid(charts) + collapsible(f"all {len(rows)} classes", table(["class", "kind", *names], lines))


def _errors(results: EvaluationResults, errors: SegmentErrors) -> str:
    counts = errors.by_class.sum(axis=0)
    total = max(1, int(counts.sum()))
    bars = [
        Bar(
            OUTCOME_TEXTS[o][0],
            int(counts[o]),
            f"{counts[o]:,} ({100 * counts[o] / total:.0f} %)",
            GOOD if o == Outcome.MATCHED else BAD,
        )
        for o in Outcome
    ]
    meanings = table(
        ["outcome", "meaning"], [[name, Cell(escape(text), "text")] for name, text in OUTCOME_TEXTS.values()]
    )
    names = _segment_names(results)
    order = np.argsort(-errors.by_class[:, 1:].sum(axis=1), kind="stable")
    by_class = _outcome_table("class", [names[k] for k in order], errors.by_class[order])
    return (
        grid([bar_chart("segments and pairs of segments", bars), meanings])
        + _outcome_table("size", [_size_name(name) for name in SIZES], errors.by_size)
        + collapsible("by class, most errors first", by_class)
    )


def _outcome_table(first: str, names: Sequence[str], counts: np.ndarray) -> str:
    """Return a table of the counts of every outcome, with their shares of the row."""
    rows = []
    for name, row in zip(names, counts.tolist(), strict=True):
        total = max(1, sum(row))
        shares = [Cell(f'{count:,} <span class="faint">{100 * count / total:.0f}&nbsp;%</span>') for count in row]
        rows.append([name, *shares])
    return table([first, *(name for name, _ in OUTCOME_TEXTS.values())], rows)


def _confusion(results: EvaluationResults) -> str:
    """Return matrices and the most frequent confusions; "" if no task has any."""
    matrices: list[tuple[str, list[str], np.ndarray]] = []
    if results.segments is not None:
        matrices.append(("segments", [*_segment_names(results), NO_PARTNER], results.segments.confusion))
    if results.pixels is not None:
        matrices.append(("pixels", _class_names(results, "semantic"), results.pixels))
    matrices = [matrix for matrix in matrices if matrix[2].any()]
    if not matrices:
        return ""
    explained = "Rows: truth; columns: prediction; per cent of the row. Segments are paired as under Errors."
    lead = paragraph(f"{explained} Bad outlines are included.", "faint")
    return (
        lead + grid([_matrix(*matrix) for matrix in matrices]) + grid([_top_confusions(*matrix) for matrix in matrices])
    )


def _matrix(unit: str, names: Sequence[str], counts: np.ndarray) -> str:
    """Return a matrix of the shares of every row, limited to the classes with the most errors."""
    wrong = counts - np.diag(counts.diagonal())
    most_confused = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:MATRIX_CLASSES]
    chosen = np.sort(most_confused)
    part = counts[np.ix_(chosen, chosen)]
    totals = np.maximum(counts.sum(axis=1)[chosen], 1)
    shown = [names[k] for k in chosen]
    texts = [
        [f"{t} as {p}: {n:,} of {total:,}" for p, n in zip(shown, row, strict=True)]
        for t, row, total in zip(shown, part.tolist(), totals.tolist(), strict=True)
    ]
    title = unit if len(chosen) == len(names) else f"{unit}: the {len(chosen)} classes with the most errors"
    return matrix_chart(title, shown, (part / totals[:, None]).tolist(), texts)


def _top_confusions(unit: str, names: Sequence[str], counts: np.ndarray) -> str:
    """Return a table of the most frequent pairs of different classes, without segments that have no partner."""
    pairs = [(t, p, n) for t, p, n in _cells(counts) if t != p and NO_PARTNER not in (names[t], names[p])]
    top = sorted(pairs, key=lambda cell: -cell[2])[:TOP_CONFUSIONS]
    totals = counts.sum(axis=1).tolist()
    rows = [
        [Cell(escape(names[t]), "text"), Cell(escape(names[p]), "text"), f"{n:,}", f"{100 * n / totals[t]:.1f} %"]
        for t, p, n in top
    ]
    return (
        table(["truth", "predicted as", unit, "share of the true class"], rows)
        if rows
        else paragraph(f"No {unit} have a wrong class.")
    )


def _pictures(panels: Mapping[int, bytes]) -> str:
    return "".join(
        picture(to_jpeg(png), f"image {image_id}: image, truth, prediction") for image_id, png in panels.items()
    )


def _segment_names(results: EvaluationResults) -> list[str]:
    return _class_names(results, "panoptic" if results.panoptic is not None else "instance")


def _class_names(results: EvaluationResults, task: Task) -> list[str]:
    return distinct_names(category.name for category in results.categories.for_task(task))


def _cells(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """Return row, column and count of every cell that is not 0."""
    return [(t, p, int(counts[t, p])) for t, p in zip(*(axis.tolist() for axis in counts.nonzero()), strict=True)]


def _counts_by_name(rows: Sequence[str], columns: Sequence[str], counts: np.ndarray) -> dict[str, dict[str, int]]:
    return {name: dict(zip(columns, row, strict=True)) for name, row in zip(rows, counts.tolist(), strict=True)}


def _size_name(size: str) -> str:
    """Return the name of a size with its bounds, as side lengths of squares in pixels."""
    low, high = (round(area**0.5) if area != float("inf") else None for area in SIZES[size])
    if high is None:
        return f"{size}, from {low} px"
    return f"{size}, {low} to {high} px" if low else f"{size}, under {high} px"


def _number(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.2f}"
        case _:
            return f"{value:,}"
