"""Box AP as COCO defines it (pycocotools' COCOeval for boxes). Its state is the same class as that of mask AP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m2f.eval.metrics.instance_matching import (
    DetectionRecord,
    InstanceDetections,
    InstanceTruth,
    ScoredDetections,
    match_by_iou,
)
from m2f.eval.metrics.rle import box_ious, mask_areas, mask_boxes


@dataclass(frozen=True)
class BoxTruth:
    """Annotated boxes of one image, in the order of the annotation."""

    boxes: np.ndarray
    """[G, 4] float64: left, top, width, height in pixels."""
    labels: np.ndarray
    """[G] int64 contiguous class indices."""
    areas: np.ndarray
    """[G] float64 areas stated by the annotation, in pixels. COCO states the area of the mask."""
    is_crowd: np.ndarray
    """[G] bool: whether the annotation is a crowd."""


@dataclass(frozen=True)
class BoxDetections:
    """Detected boxes of one image. Boxes with equal scores are ranked in this order."""

    boxes: np.ndarray
    """[D, 4] float64: left, top, width, height in pixels."""
    labels: np.ndarray
    """[D] int64 contiguous class indices."""
    scores: np.ndarray
    """[D] float64 scores."""
    areas: np.ndarray
    """[D] float64 areas for the size ranges: pixels of masks, or areas of the boxes if there are no masks."""


def match_boxes(
    truth: BoxTruth, detections: BoxDetections, limit: int, ranges: np.ndarray | None = None
) -> DetectionRecord:
    """Match the detections of one image greedily by the IoU of boxes, as `match_by_iou` does."""
    ious = box_ious(detections.boxes, truth.boxes, truth.is_crowd)
    scored = ScoredDetections(detections.labels, detections.scores, detections.areas, ious)
    return match_by_iou(truth.labels, truth.areas, truth.is_crowd, scored, limit, ranges)


def truth_boxes(truth: InstanceTruth) -> BoxTruth:
    """Return the boxes of annotated masks."""
    return BoxTruth(mask_boxes(truth.masks), truth.labels, truth.areas, truth.is_crowd)


def detection_boxes(detections: InstanceDetections) -> BoxDetections:
    """Return the boxes of detected masks; their areas remain those of the masks."""
    boxes, areas = mask_boxes(detections.masks), mask_areas(detections.masks)
    index = detections.mask_index
    return BoxDetections(boxes[index], detections.labels, detections.scores, areas[index])
