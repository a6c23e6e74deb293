"""JSON responses of a served model: COCO formats, with maps as base64-encoded PNG."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.cluster.api.result import Result
from m2f.data_pipeline.categories import Category
from m2f.eval.report.coco_files import label_png


def panoptic_answer(result: Result) -> dict[str, Any]:
    """Return `segments_info` as in COCO's panoptic JSON, plus category names, and `png`, the map of segment ids."""
    annotation, png = result.to_coco_panoptic(0, "")
    named = zip(annotation["segments_info"], result.class_names, strict=True)
    return {"segments_info": [{**entry, "category": name} for entry, name in named], "png": _text(png)}


def instances_answer(result: Result, lowest: np.ndarray | None, min_score: float) -> list[dict[str, Any]]:
    """Return COCO results with masks, boxes (x, y, width, height in pixels) and category names, best score first.

    `lowest` [K] holds the lowest accepted score of each class; None accepts all. Detections below it or below
    `min_score` are omitted.
    """
    limits = np.full(len(result.names), min_score) if lowest is None else np.maximum(lowest, min_score)
    counted = result.scores >= limits[result.labels]
    boxes = result.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(result.to_coco(0), result.class_names, boxes.tolist(), counted.tolist(), strict=True)
    return [
        {**{key: value for key, value in entry.items() if key != "image_id"}, "category": name, "bbox": box}
        for entry, name, box, counts in rows
        if counts
    ]


def semantic_answer(result: Result, classes: Sequence[Category]) -> dict[str, Any]:
    """Return `png`, the map of category ids."""
    return {"png": _text(label_png(result.semantic, classes))}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
