"""Box average precision as COCO defines it (pycocotools' COCOeval for boxes). Records go into the state of mask AP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m2f.eval.metrics.instance_matching import (
    DetectionRecord,
    InstanceDetections,
    InstanceTruth,
    Scored,
    match_by_iou,
)
from m2f.eval.metrics.rle import box_ious, mask_areas, mask_boxes


@dataclass(frozen=True)
class BoxTruth:
    """Annotated boxes of one image, in the order of the annotation."""

    boxes: np.ndarray
    """[G, 4] float64 left, top, width, height in pixels."""
    labels: np.ndarray
    """[G] int64 contiguous classes."""
    areas: np.ndarray
    """[G] float64 as the annotation states them: of COCO's objects that of the mask."""
    is_crowd: np.ndarray
    """[G] bool"""


@dataclass(frozen=True)
class BoxDetections:
    """Detected boxes of one image in canonical order (ties of scores keep it)."""

    boxes: np.ndarray
    """[D, 4] float64 left, top, width, height in pixels."""
    labels: np.ndarray
    """[D] int64 contiguous classes."""
    scores: np.ndarray
    """[D] float64"""
    areas: np.ndarray
    """[D] float64 by which detections are small, medium or large: of masks their pixels, of mere boxes their own."""


def match_boxes(
    truth: BoxTruth, detections: BoxDetections, limit: int, ranges: np.ndarray | None = None
) -> DetectionRecord:
    """Greedy matching of one image by the IoU of boxes, as `match_by_iou` does it."""
    ious = box_ious(detections.boxes, truth.boxes, truth.is_crowd)
    found = Scored(detections.labels, detections.scores, detections.areas, ious)
    return match_by_iou(truth.labels, truth.areas, truth.is_crowd, found, limit, ranges)


def boxes_of_truth(truth: InstanceTruth) -> BoxTruth:
    """The boxes of annotated masks."""
    return BoxTruth(mask_boxes(truth.masks), truth.labels, truth.areas, truth.is_crowd)


def boxes_of_detections(detections: InstanceDetections) -> BoxDetections:
    """The boxes of detected masks, whose sizes stay those of the masks."""
    boxes, areas = mask_boxes(detections.masks), mask_areas(detections.masks)
    index = detections.mask_index
    return BoxDetections(boxes[index], detections.labels, detections.scores, areas[index])
