"""JSON responses of a served model: COCO formats, with maps as base64-encoded PNG."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.cluster.api.model import predictable_tasks
from m2f.cluster.api.result import Result
from m2f.cluster.predict.trained_model import TrainedModel
from m2f.data_pipeline.categories import Category, Task
from m2f.eval.errors import EvaluationError
from m2f.eval.report.coco_files import label_png


def served_tasks(trained: TrainedModel) -> tuple[Task, ...]:
    """Return the tasks of a request that names none: those that the model can predict and a response can hold."""
    tasks = predictable_tasks(trained)
    try:
        label_png(np.zeros((1, 1), dtype=np.int64), trained.classes)
    except EvaluationError:  # the category ids are too large for a PNG
        return tuple(task for task in tasks if task != "semantic")
    return tasks


def panoptic_response(result: Result) -> dict[str, Any]:
    """Return `segments_info` as in COCO's panoptic JSON, plus category names, and `png`, the map of segment ids."""
    annotation, png = result.to_coco_panoptic(0, "")
    named = zip(annotation["segments_info"], result.class_names, strict=True)
    return {"segments_info": [{**entry, "category": name} for entry, name in named], "png": _base64(png)}


def instances_response(result: Result, class_thresholds: np.ndarray | None, min_score: float) -> list[dict[str, Any]]:
    """Return COCO results with masks, boxes (x, y, width, height in pixels) and category names, best score first.

    `class_thresholds` [K] holds the lowest accepted score of each class; None accepts all. Detections below it or below
    `min_score` are omitted.
    """
    lowest = np.zeros(len(result.names)) if class_thresholds is None else class_thresholds
    limits = np.maximum(lowest, min_score)
    accepted = result.scores >= limits[result.labels]
    boxes = result.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(result.to_coco(0), result.class_names, boxes.tolist(), accepted.tolist(), strict=True)
    return [
        {**{key: value for key, value in entry.items() if key != "image_id"}, "category": name, "bbox": box}
        for entry, name, box, is_accepted in rows
        if is_accepted
    ]


def semantic_response(result: Result, classes: Sequence[Category]) -> dict[str, Any]:
    """Return `png`, the map of category ids."""
    return {"png": _base64(label_png(result.semantic, classes))}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
