"""Errors of segments: missed, of another class, with a bad outline, duplicate, or predicted on background.

These errors are computed in addition to the metrics, as a mergeable state. Every annotated segment except crowds, and
every prediction that is not ignored, gets exactly one outcome. The two segments of a pair share an outcome. For
panoptic results, MATCHED counts the true positives of panoptic quality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.metrics.overlaps import count_overlaps
from m2f.eval.metrics.panoptic_quality import MATCH_IOU, MAX_IGNORED, PanopticPrediction, PanopticTruth
from m2f.eval.metrics.rle import mask_areas, mask_ious

OUTLINE_IOU = 0.1
"""Lowest IoU at which a prediction of the right class has a bad outline. Below it, the two segments are not paired."""
MIN_SCORE = 0.5
"""Detections of instances below this score are left out, because a model returns 100 detections for every image."""
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}
"""Ranges of areas in pixels; the upper bound is excluded."""
NO_SEGMENT = -1
"""Class of the missing partner of a segment that is not paired."""


class Outcome(IntEnum):
    """Outcome of a segment or of a pair of segments."""

    MATCHED = 0
    """Right class, IoU above 0.5."""
    OUTLINE = 1
    """Right class, IoU from 0.1 to 0.5."""
    CLASS = 2
    """Another class, IoU above 0.5."""
    MISSED = 3
    """An annotated segment without a paired prediction."""
    DUPLICATE = 4
    """An unpaired prediction that lies, by more than half of its area, in paired annotated segments of its class."""
    BACKGROUND = 5
    """Any other unpaired prediction."""


@dataclass(frozen=True, eq=False)
class SegmentRecord(Record):
    """Segments and pairs of segments of one image."""

    truth: np.ndarray = field(metadata=column("int32"))
    """Class of the annotated segment; NO_SEGMENT for a prediction without a partner."""
    predicted: np.ndarray = field(metadata=column("int32"))
    """Class of the prediction; NO_SEGMENT for an annotated segment without a partner."""
    outcome: np.ndarray = field(metadata=column("uint8"))
    area: np.ndarray = field(metadata=column("float64"))
    """Pixels of the annotated segment, or of the prediction if there is none."""


@dataclass(frozen=True)
class SegmentErrors:
    """Counts of outcomes over an image set."""

    confusion: np.ndarray
    """[K + 1 truth, K + 1 predicted] int64. The last row and column count segments without a partner."""
    by_class: np.ndarray
    """[K, outcomes] int64, by class of the annotated segment, or of the prediction if there is none."""
    by_size: np.ndarray
    """[sizes, outcomes] int64."""


@dataclass(frozen=True)
class Candidates:
    """Segments of one image and their overlaps: T annotated segments without crowds, and P predictions."""

    truth_labels: np.ndarray
    """[T] int class indices."""
    truth_areas: np.ndarray
    """[T] areas in pixels."""
    predicted_labels: np.ndarray
    """[P] int class indices."""
    predicted_areas: np.ndarray
    """[P] areas in pixels."""
    iou: np.ndarray
    """[P, T] IoU of each pair."""
    inside: np.ndarray
    """[P, T] share of the prediction's area inside the annotated segment."""
    ignored: np.ndarray
    """[P] share of the prediction's area in void and in crowds of its class."""


class SegmentErrorState(MetricState[SegmentRecord, SegmentErrors]):
    """Outcomes per image, of panoptic segments or of confident instances."""

    name = "segment errors"

    def __init__(self, num_classes: int) -> None:
        super().__init__(SegmentRecord, {"num_classes": num_classes})
        self.num_classes = num_classes

    def update(self, image_id: int, candidates: Candidates) -> None:
        """Add the outcomes of one image."""
        self.add(image_id, assign_outcomes(candidates))

    def image_quality(self, image_id: int) -> float | None:
        """Return matches divided by the mean number of annotated and predicted segments; None without segments."""
        outcome = self.record(image_id).outcome
        matched = int((outcome == Outcome.MATCHED).sum())
        pairs = int(np.isin(outcome, (Outcome.MATCHED, Outcome.OUTLINE, Outcome.CLASS)).sum())
        segments = (len(outcome) + pairs) / 2
        return matched / segments if segments else None

    def compute(self) -> SegmentErrors:
        """Sum the outcomes over the images."""
        truth, predicted, outcome = self.rows("truth"), self.rows("predicted"), self.rows("outcome")
        confusion = np.zeros((self.num_classes + 1, self.num_classes + 1), dtype=np.int64)
        np.add.at(confusion, (truth, predicted), 1)  # NO_SEGMENT is -1, which indexes the last row or column
        by_class = np.zeros((self.num_classes, len(Outcome)), dtype=np.int64)
        np.add.at(by_class, (np.where(truth == NO_SEGMENT, predicted, truth), outcome), 1)
        by_size = np.zeros((len(SIZES), len(Outcome)), dtype=np.int64)
        upper = [high for _, high in SIZES.values()][:-1]
        np.add.at(by_size, (np.searchsorted(upper, self.rows("area"), side="right"), outcome), 1)
        return SegmentErrors(confusion, by_class, by_size)


def assign_outcomes(segments: Candidates) -> SegmentRecord:
    """Pair segments, best IoU first: right class, then another class, then a bad outline. Then classify the rest."""
    same = segments.predicted_labels[:, None] == segments.truth_labels
    fits = segments.iou > MATCH_IOU
    stages = (
        (Outcome.MATCHED, same & fits),
        (Outcome.CLASS, ~same & fits),
        (Outcome.OUTLINE, same & (segments.iou >= OUTLINE_IOU)),
    )
    free_truth = np.ones(len(segments.truth_labels), dtype=bool)
    free_predicted = np.ones(len(segments.predicted_labels), dtype=bool)
    rows: list[tuple[int, int, int, float]] = []
    for outcome, allowed in stages:
        p, t = allowed.nonzero()
        for i in np.argsort(-segments.iou[p, t], kind="stable"):
            if free_predicted[p[i]] and free_truth[t[i]]:
                free_predicted[p[i]] = free_truth[t[i]] = False
                labels = segments.truth_labels[t[i]], segments.predicted_labels[p[i]]
                rows.append((*labels, outcome, segments.truth_areas[t[i]]))
    missed = zip(segments.truth_labels[free_truth], segments.truth_areas[free_truth], strict=True)
    rows += [(label, NO_SEGMENT, Outcome.MISSED, area) for label, area in missed]
    taken = same & ~free_truth
    for p in np.flatnonzero(free_predicted & (segments.ignored <= MAX_IGNORED)):
        is_duplicate = segments.inside[p][taken[p]].sum() > 0.5
        outcome = Outcome.DUPLICATE if is_duplicate else Outcome.BACKGROUND
        rows.append((NO_SEGMENT, segments.predicted_labels[p], outcome, segments.predicted_areas[p]))
    truth, predicted, outcomes, areas = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return SegmentRecord(truth=truth, predicted=predicted, outcome=outcomes, area=areas)


def panoptic_candidates(truth: PanopticTruth, prediction: PanopticPrediction) -> Candidates:
    """Compare the segments of two id maps. As in panoptic quality, the IoU leaves out predicted pixels in void."""
    overlaps = count_overlaps(truth.id_map, prediction.id_map)
    truth_ids = [i for i, segment in truth.segments.items() if not segment.is_crowd]
    areas = [truth.segments[i].area for i in truth_ids]
    predicted_ids = list(prediction.labels)
    shape = len(predicted_ids), len(truth_ids)
    iou = [[overlaps.iou(t, p, area) for t, area in zip(truth_ids, areas, strict=True)] for p in predicted_ids]
    shared = [[overlaps.pixels.get((t, p), 0) for t in truth_ids] for p in predicted_ids]
    last_crowd = {segment.label: i for i, segment in truth.segments.items() if segment.is_crowd}
    ignored = [
        sum(overlaps.pixels.get((i, p), 0) for i in (VOID_ID, last_crowd.get(label)) if i is not None)
        for p, label in prediction.labels.items()
    ]
    predicted_areas = np.array([overlaps.predicted_area[p] for p in predicted_ids], dtype=float)
    return Candidates(
        truth_labels=np.array([truth.segments[i].label for i in truth_ids], dtype=np.int64),
        truth_areas=np.array(areas, dtype=float),
        predicted_labels=np.array(list(prediction.labels.values()), dtype=np.int64),
        predicted_areas=predicted_areas,
        iou=np.array(iou, dtype=float).reshape(shape),
        inside=np.array(shared, dtype=float).reshape(shape) / predicted_areas[:, None],
        ignored=np.array(ignored, dtype=float) / predicted_areas,
    )


def instance_candidates(truth: InstanceTruth, detections: InstanceDetections) -> Candidates:
    """Compare the annotated instances of one image with its detections of at least MIN_SCORE."""
    confident = np.flatnonzero(detections.scores >= MIN_SCORE)
    masks = tuple(detections.masks[i] for i in detections.mask_index[confident])
    labels, not_crowd = detections.labels[confident], ~truth.is_crowd
    # If all instances are treated as crowds, `mask_ious` returns the share of each prediction inside each instance.
    inside = mask_ious(masks, truth.masks, np.ones_like(truth.is_crowd))
    in_crowd = np.where(truth.is_crowd & (labels[:, None] == truth.labels), inside, 0.0)
    return Candidates(
        truth_labels=truth.labels[not_crowd],
        truth_areas=truth.areas[not_crowd],
        predicted_labels=labels,
        predicted_areas=mask_areas(masks).astype(float),
        iou=mask_ious(masks, truth.masks, np.zeros_like(truth.is_crowd))[:, not_crowd],
        inside=inside[:, not_crowd],
        ignored=in_crowd.sum(axis=1),
    )
