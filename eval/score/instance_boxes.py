"""Boxes of COCO's instance files: those stated in the files, else those of the masks.

As in pycocotools, annotations have the area that they state. Detections have the area of their stated box, else of
their mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.box_average_precision import (
    BoxDetections,
    BoxTruth,
    detection_boxes,
    truth_boxes,
)
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.score.instance_files import Entry, ImageEntries, InstanceFiles


def box_truth(image: ImageEntries, truth: InstanceTruth, files: InstanceFiles) -> BoxTruth:
    """Return the boxes of one image's annotations. Raises EvaluationError naming an annotation with an invalid box."""
    from_masks = truth_boxes(truth)
    names = [files.describe_annotation(image, i) for i in range(len(image.annotations))]
    stated = _stated_boxes(image.annotations, names)
    boxes = np.where(np.isnan(stated), from_masks.boxes, stated)
    return BoxTruth(boxes, from_masks.labels, from_masks.areas, from_masks.is_crowd)


def box_detections(
    image: ImageEntries, detections: InstanceDetections, dropped: frozenset[int], files: InstanceFiles
) -> BoxDetections:
    """Return the boxes of the results of one image, without those of `dropped` categories; errors as in `box_truth`."""
    kept = [
        (i, entry)
        for i, entry in enumerate(image.results)
        if isinstance(entry, dict) and entry.get("category_id") not in dropped
    ]
    from_masks = detection_boxes(detections)
    stated = _stated_boxes([entry for _, entry in kept], [files.describe_result(image, i) for i, _ in kept])
    boxes = np.where(np.isnan(stated), from_masks.boxes, stated)
    areas = np.where(np.isnan(stated[:, 0]), from_masks.areas, boxes[:, 2] * boxes[:, 3])
    return BoxDetections(boxes, from_masks.labels, from_masks.scores, areas)


def _stated_boxes(entries: Sequence[Entry], names: Sequence[str]) -> np.ndarray:
    """Return stated boxes [N, 4] as left, top, width, height; NaN for an entry without a box."""
    boxes = np.full((len(entries), 4), np.nan)
    for position, entry in enumerate(entries):
        box = entry.get("bbox")
        if box is None or box == []:
            continue
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box) or min(box[2:]) < 0:
            raise EvaluationError(
                f"{names[position]} has bbox {str(box)[:80]}; it must be left, top, width and height in pixels"
            )
        if any(box):  # boxes of zeros, as the official code writes them, carry no information
            boxes[position] = box
    return boxes


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12 and math.isfinite(value)
