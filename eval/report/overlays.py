"""Overlays of truth and predictions of every task, for panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.metrics.mean_iou import ignore_label
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth
from m2f.eval.metrics.rle import Rle, decode_mask
from m2f.eval.report.panels import Overlay, OverlaySegment
from m2f.model.structures import UNLABELLED

MIN_SHOWN_SCORE = 0.5
"""Pictures leave out detections below this score; metrics count all."""


def panoptic_overlays(
    truth: PanopticTruth, prediction: PanopticPrediction, scores: dict[int, float], quality: float | None
) -> tuple[Overlay, Overlay]:
    """Return the overlays of truth and prediction.

    Crowds of the truth are drawn like other segments. `scores` holds the score of every predicted segment by id.
    `quality` is the PQ of the image, 0 to 1, for the title.
    """
    title = "prediction" if quality is None else f"prediction, PQ {100 * quality:.1f}"
    annotated = {i: OverlaySegment(segment.label) for i, segment in truth.segments.items()}
    predicted = predicted_segments(title, prediction.id_map, prediction.labels, scores)
    return Overlay("truth", truth.id_map, annotated), predicted


def instance_overlays(
    truth: InstanceTruth, detections: InstanceDetections, size: tuple[int, int]
) -> tuple[Overlay, Overlay]:
    """Return the overlays of truth, with small instances on top, and prediction, with high scores on top."""
    by_area = np.argsort(-truth.areas, kind="stable")
    annotated = _flatten(
        "truth", [truth.masks[i] for i in by_area], [OverlaySegment(int(truth.labels[i])) for i in by_area], size
    )
    return annotated, predicted_instances(detections, size)


def semantic_overlays(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[Overlay, Overlay]:
    """Return the overlays of truth and prediction, with one segment per class."""
    labelled = truth != ignore_label(num_classes)
    annotated = np.where(labelled, truth.astype(np.int32), UNLABELLED)
    return _labels("truth", annotated, num_classes), predicted_labels(predicted, num_classes)


def predicted_segments(
    title: str, id_map: np.ndarray, labels: Mapping[int, int], scores: Mapping[int, float]
) -> Overlay:
    """Return the overlay of a panoptic map [H, W], with labels and scores by segment id."""
    return Overlay(title, id_map, {i: OverlaySegment(label, scores[i]) for i, label in labels.items()})


def predicted_instances(
    detections: InstanceDetections, size: tuple[int, int], min_score: float = MIN_SHOWN_SCORE
) -> Overlay:
    """Return the overlay of detections with high scores on top, without those below `min_score`."""
    shown = np.flatnonzero(detections.scores >= min_score)[::-1]
    return _flatten(
        "prediction",
        [detections.masks[detections.mask_index[i]] for i in shown],
        [OverlaySegment(int(detections.labels[i]), float(detections.scores[i])) for i in shown],
        size,
    )


def predicted_labels(label_map: np.ndarray, num_classes: int) -> Overlay:
    """Return the overlay of a label map [H, W]: one segment per class, none for UNLABELLED pixels."""
    return _labels("prediction", label_map, num_classes)


def _labels(title: str, label_map: np.ndarray, num_classes: int) -> Overlay:
    segments = {label + 1: OverlaySegment(label) for label in range(num_classes)}
    return Overlay(title, np.where(label_map == UNLABELLED, VOID_ID, label_map + 1).astype(np.int32), segments)


def _flatten(title: str, masks: Sequence[Rle], segments: Sequence[OverlaySegment], size: tuple[int, int]) -> Overlay:
    """Return the overlay of masks that may overlap; later masks cover earlier ones."""
    id_map = np.zeros(size, dtype=np.int32)
    for position, mask in enumerate(masks, start=1):
        id_map[decode_mask(mask)] = position
    return Overlay(title, id_map, dict(enumerate(segments, start=1)))
