"""From the truths and predictions of every task to what a panel draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.average_precision import InstanceDetections, InstanceTruth
from eval.masks import Rle, decode_mask
from eval.mean_iou import ignore_label
from eval.panels import Scene, SceneSegment
from eval.panoptic_quality import PanopticPrediction, PanopticTruth

SHOWN_SCORE = 0.5
"""Detections below this are left out of pictures; metrics count them all."""


def panoptic_scenes(
    truth: PanopticTruth, prediction: PanopticPrediction, scores: dict[int, float], quality: float | None
) -> tuple[Scene, Scene]:
    """Truth and prediction; crowds are drawn like other segments. `scores` by segment id, `quality` of the image."""
    title = "prediction" if quality is None else f"prediction, PQ {100 * quality:.1f}"
    annotated = {i: SceneSegment(segment.label) for i, segment in truth.segments.items()}
    predicted = {i: SceneSegment(label, scores[i]) for i, label in prediction.labels.items()}
    return Scene("truth", truth.id_map, annotated), Scene(title, prediction.id_map, predicted)


def instance_scenes(truth: InstanceTruth, detections: InstanceDetections, size: tuple[int, int]) -> tuple[Scene, Scene]:
    """Truth with small instances over large ones, prediction with good detections over worse ones."""
    by_area = np.argsort(-truth.areas, kind="stable")
    annotated = _flatten(
        "truth", [truth.masks[i] for i in by_area], [SceneSegment(int(truth.labels[i])) for i in by_area], size
    )
    shown = np.flatnonzero(detections.scores >= SHOWN_SCORE)[::-1]
    predicted = _flatten(
        "prediction",
        [detections.masks[detections.mask_index[i]] for i in shown],
        [SceneSegment(int(detections.labels[i]), float(detections.scores[i])) for i in shown],
        size,
    )
    return annotated, predicted


def semantic_scenes(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[Scene, Scene]:
    """Truth and prediction; one segment per class."""
    segments = {label + 1: SceneSegment(label) for label in range(num_classes)}
    labelled = truth != ignore_label(num_classes)
    return (
        Scene("truth", np.where(labelled, truth.astype(np.int32) + 1, 0), segments),
        Scene("prediction", predicted.astype(np.int32) + 1, segments),
    )


def _flatten(title: str, masks: Sequence[Rle], segments: Sequence[SceneSegment], size: tuple[int, int]) -> Scene:
    id_map = np.zeros(size, dtype=np.int32)
    for position, mask in enumerate(masks, start=1):
        id_map[decode_mask(mask)] = position
    return Scene(title, id_map, dict(enumerate(segments, start=1)))
