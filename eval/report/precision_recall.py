"""Precision over recall: the curves behind mask AP, as numbers and as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from m2f.eval.metrics.average_precision import RECALL_THRESHOLDS, AveragePrecision
from m2f.eval.metrics.instance_matching import AREA_RANGES, IOU_THRESHOLDS
from m2f.eval.report.charts import Series, line_chart, small_chart
from m2f.eval.report.page import collapsible, grid, paragraph
from m2f.eval.results.results import EvaluationResults

PR_THRESHOLDS = {"IoU 0.50": 0, "IoU 0.75": 5}
"""Positions in IOU_THRESHOLDS whose curves are shown, in addition to the mean over all thresholds."""
MAX_UNFOLDED_CHARTS = 24
"""Largest number of small charts that are shown unfolded."""


def precision_recall(results: EvaluationResults) -> dict[str, list[float]] | None:
    """Return precision at every recall, averaged over annotated classes; None without AP or without annotations."""
    curves = None if results.instance is None else _mean_curves(results.instance.precision[..., 0, -1])
    return None if curves is None else {"recall": RECALL_THRESHOLDS.tolist(), **_named_curves(curves)}


def curves_by_size(result: AveragePrecision) -> dict[str, list[float] | None]:
    """Return precision at every recall by size, averaged over IoU and classes; None for sizes without annotations."""
    sizes = {name: position for position, name in enumerate(AREA_RANGES) if name != "all"}
    curves = {name: _mean_curves(result.precision[..., position, -1]) for name, position in sizes.items()}
    return {name: None if curve is None else curve.mean(axis=0).tolist() for name, curve in curves.items()}


def curves_by_class(result: AveragePrecision) -> list[dict[str, list[float]] | None]:
    """Return the curves of `precision_recall` for every class; None for a class without annotations."""
    precision = result.precision[..., 0, -1]  # [thresholds, recalls, classes]
    annotated = (precision[0, 0] > -1).tolist()
    return [_named_curves(precision[..., k]) if annotated[k] else None for k in range(precision.shape[-1])]


def _mean_curves(precision: np.ndarray) -> np.ndarray | None:
    """Average [thresholds, recalls, classes] over the annotated classes; None if there are none."""
    annotated = precision[0, 0] > -1
    return precision[..., annotated].mean(axis=-1) if annotated.any() else None


def _named_curves(curves: np.ndarray) -> dict[str, list[float]]:
    """Return the curves of two thresholds and of the mean over all, from [thresholds, recalls]."""
    named = {name: curves[position].tolist() for name, position in PR_THRESHOLDS.items()}
    mean = f"mean of IoU {IOU_THRESHOLDS[0]:.2f} to {IOU_THRESHOLDS[-1]:.2f}"
    return named | {mean: curves.mean(axis=0).tolist()}


def precision_recall_charts(results: EvaluationResults, curves: Mapping[str, Sequence[float]]) -> str:
    """Return charts of the mean curves, of the curves by size, and of every class, the lowest AP first."""
    assert results.instance is not None
    by_size = {name: curve for name, curve in curves_by_size(results.instance).items() if curve is not None}
    overall = {name: curve for name, curve in curves.items() if name != "recall"}
    limits = ((0.0, 100.0), (0.0, 100.0))
    charts = [
        line_chart("precision at recall, mean over classes", _series(overall), "recall", limits=limits),
        line_chart("by size, mean over IoU and classes", _series(by_size), "recall", limits=limits),
    ]
    names = [c.name for c in results.categories.for_task("instance")]
    rows = zip(results.instance.per_class, names, curves_by_class(results.instance), strict=True)
    annotated = sorted(((ap, name, curve) for ap, name, curve in rows if curve is not None), key=lambda row: row[0])
    small = [small_chart(name, f"AP {100 * ap:.1f}", _series(curve)) for ap, name, curve in annotated]
    lead = paragraph("By class, the lowest AP first; curves as in the first chart.", "faint")
    body = lead + grid(small, small=True)
    return grid(charts) + (
        body if len(small) <= MAX_UNFOLDED_CHARTS else collapsible(f"all {len(small)} classes", body)
    )


def _series(curves: Mapping[str, Sequence[float]]) -> list[Series]:
    recall = RECALL_THRESHOLDS.tolist()
    return [
        Series(name, [(100 * r, 100 * p) for r, p in zip(recall, precision, strict=True)])
        for name, precision in curves.items()
    ]
