"""Results as a served model answers them: COCO's formats, with maps as PNG in base64, all of it JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.cluster.api.result import Result
from m2f.data_pipeline.categories import Category
from m2f.eval.report.coco_files import label_png


def panoptic_answer(result: Result) -> dict[str, Any]:
    """`segments_info` as in COCO's panoptic JSON, each with the name of its category, and `png`, the map of ids."""
    annotation, png = result.to_coco_panoptic(0, "")
    named = zip(annotation["segments_info"], result.class_names, strict=True)
    return {"segments_info": [{**entry, "category": name} for entry, name in named], "png": _text(png)}


def instances_answer(result: Result, lowest: np.ndarray | None, min_score: float) -> list[dict[str, Any]]:
    """COCO results with masks and boxes (x, y, width, height), best first, each with the name of its category.

    `lowest` [K] is the lowest score of each class that counts; None: everything from `min_score` on.
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
    """`png`: the map of category ids."""
    return {"png": _text(label_png(result.semantic, classes))}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
