"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4) as a mergeable state.

Follows the COCO panoptic evaluation to the letter, crowd and void rules included, on id maps in memory: one pair table
per image gives every intersection and area.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.sample import VOID_ID
from eval.errors import EvaluationError
from eval.state import MetricState, Record, column

MATCH_IOU = 0.5
"""A match needs a larger IoU than this, which makes matches unique."""
IGNORE_SHARE = 0.5
"""An unmatched prediction with a larger share of void and crowd than this is not counted."""
DENSE_IDS = 2048
"""Id maps whose largest id is below this index the pair table directly."""


@dataclass(frozen=True, slots=True)
class TruthSegment:
    """One annotated segment; its pixels are those of the map that equal its id."""

    label: int
    """Contiguous class."""
    area: float
    """As the annotation states it; it enters the union in place of the pixel count."""
    is_crowd: bool


@dataclass(frozen=True)
class PanopticTruth:
    """Ground truth of one image. Pixels with VOID_ID are void; an id without a segment is neither void nor segment."""

    id_map: np.ndarray
    """[H, W] integers."""
    segments: Mapping[int, TruthSegment]
    """By id, in the order of the annotation (of several crowds of a class only the last protects predictions)."""


@dataclass(frozen=True)
class PanopticPrediction:
    """Prediction for one image."""

    id_map: np.ndarray
    """[H, W] integers; VOID_ID = no segment."""
    labels: Mapping[int, int]
    """Segment id -> contiguous class."""


@dataclass(frozen=True, eq=False)
class PanopticRecord(Record):
    """Matches and errors of one image, by class."""

    matched_label: np.ndarray = field(metadata=column("int32"))
    matched_iou: np.ndarray = field(metadata=column("float64"))
    false_positive: np.ndarray = field(metadata=column("int32"))
    """Class of every unmatched prediction that counts."""
    false_negative: np.ndarray = field(metadata=column("int32"))
    """Class of every unmatched annotated segment that counts."""


@dataclass(frozen=True)
class Quality:
    """PQ = SQ x RQ, averaged over the classes that occur; shares, not per cent."""

    pq: float
    sq: float
    rq: float
    num_classes: int
    """Classes averaged: those with a match or an error."""


@dataclass(frozen=True)
class ClassQuality:
    """Quality of one class; zeros where the class does not occur."""

    pq: float
    sq: float
    rq: float
    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def occurs(self) -> bool:
        """Whether the class counts in averages."""
        return self.true_positives + self.false_positives + self.false_negatives > 0


@dataclass(frozen=True)
class PanopticQuality:
    """Panoptic quality of an image set; a split without any class that occurs is None."""

    all: Quality | None
    things: Quality | None
    stuff: Quality | None
    per_class: tuple[ClassQuality, ...]


class PanopticQualityState(MetricState[PanopticRecord, PanopticQuality]):
    """Matches and errors per image. `is_thing[label]` tells things from stuff."""

    name = "panoptic quality"

    def __init__(self, is_thing: Sequence[bool]) -> None:
        super().__init__(PanopticRecord, {"is_thing": list(is_thing)})
        self.is_thing = tuple(is_thing)

    def update(self, image_id: int, truth: PanopticTruth, prediction: PanopticPrediction) -> None:
        """Match one image. Raises EvaluationError where the two maps or the prediction's own tables disagree."""
        try:
            self.add(image_id, match_panoptic(truth, prediction))
        except InconsistentMapError as error:
            raise EvaluationError(f"image {image_id}: {error}") from error

    def compute(self) -> PanopticQuality:
        """Averages over all classes, things and stuff, and every class by itself."""
        num_classes = len(self.is_thing)
        matched = self.rows("matched_label")
        # bincount adds in the order of the rows: image by image, so the sums have the same bits for every sharding.
        iou = np.bincount(matched, weights=self.rows("matched_iou"), minlength=num_classes)
        true_positives = np.bincount(matched, minlength=num_classes)
        false_positives = np.bincount(self.rows("false_positive"), minlength=num_classes)
        false_negatives = np.bincount(self.rows("false_negative"), minlength=num_classes)
        counts = zip(
            iou.tolist(), true_positives.tolist(), false_positives.tolist(), false_negatives.tolist(), strict=True
        )
        per_class = tuple(_class_quality(*row) for row in counts)
        pairs = list(zip(per_class, self.is_thing, strict=True))
        return PanopticQuality(
            all=_average(per_class),
            things=_average([quality for quality, is_thing in pairs if is_thing]),
            stuff=_average([quality for quality, is_thing in pairs if not is_thing]),
            per_class=per_class,
        )

    def image_quality(self, image_id: int) -> float | None:
        """PQ of one image, all its segments taken as one class; None if nothing counts in it.

        For choosing and titling pictures, not for comparison with published numbers.
        """
        record = self.record(image_id)
        tp, fp, fn = len(record.matched_label), len(record.false_positive), len(record.false_negative)
        return float(record.matched_iou.sum()) / (tp + 0.5 * fp + 0.5 * fn) if tp + fp + fn else None


class InconsistentMapError(ValueError):
    """Maps that do not belong together, or a map and a table that do not."""


def match_panoptic(truth: PanopticTruth, prediction: PanopticPrediction) -> PanopticRecord:
    """Matches, false positives and false negatives of one image, matches in ascending (truth id, predicted id)."""
    truth_ids, predicted_ids, pairs = pair_table(truth.id_map, prediction.id_map)
    predicted_area = dict(zip(predicted_ids, pairs.sum(axis=0).tolist(), strict=True))
    _check_tables_agree(prediction, predicted_area)

    inside: dict[tuple[int, int], int] = {
        (truth_ids[row], predicted_ids[col]): int(pairs[row, col]) for row, col in zip(*pairs.nonzero(), strict=True)
    }
    matches: list[tuple[int, float]] = []
    matched_truth, matched_prediction = set(), set()
    for (truth_id, predicted_id), intersection in inside.items():
        segment = truth.segments.get(truth_id)
        if segment is None or segment.is_crowd or segment.label != prediction.labels.get(predicted_id):
            continue
        void = inside.get((VOID_ID, predicted_id), 0)
        iou = intersection / (predicted_area[predicted_id] + segment.area - intersection - void)
        if iou > MATCH_IOU:
            matches.append((segment.label, iou))
            matched_truth.add(truth_id)
            matched_prediction.add(predicted_id)

    crowd_of = {segment.label: truth_id for truth_id, segment in truth.segments.items() if segment.is_crowd}
    false_positive = []
    for predicted_id, label in prediction.labels.items():
        ignored = inside.get((VOID_ID, predicted_id), 0)
        if label in crowd_of:
            ignored += inside.get((crowd_of[label], predicted_id), 0)
        if predicted_id not in matched_prediction and ignored / predicted_area[predicted_id] <= IGNORE_SHARE:
            false_positive.append(label)
    false_negative = [s.label for i, s in truth.segments.items() if i not in matched_truth and not s.is_crowd]
    return PanopticRecord(
        matched_label=np.array([label for label, _ in matches]),
        matched_iou=np.array([iou for _, iou in matches]),
        false_positive=np.array(sorted(false_positive)),
        false_negative=np.array(sorted(false_negative)),
    )


def pair_table(truth: np.ndarray, predicted: np.ndarray) -> tuple[list[int], list[int], np.ndarray]:
    """Pixels in every pair of ids: the ids of rows and columns, ascending, and their counts [rows, columns]."""
    if truth.shape != predicted.shape:
        raise InconsistentMapError(f"the truth has the shape {truth.shape}, the prediction {predicted.shape}")
    truth_ids, rows = _compact(truth)
    predicted_ids, columns = _compact(predicted)
    index = rows.astype(np.intp)
    index *= len(predicted_ids)
    index += columns
    counts = np.bincount(index.ravel(), minlength=len(truth_ids) * len(predicted_ids))
    return truth_ids, predicted_ids, counts.reshape(len(truth_ids), len(predicted_ids))


def _compact(id_map: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Ids (a superset of those present) and the map of positions in them."""
    largest = int(id_map.max(initial=0))
    if largest < DENSE_IDS and int(id_map.min(initial=0)) >= 0:
        return list(range(largest + 1)), id_map
    ids, positions = np.unique(id_map, return_inverse=True)
    return ids.tolist(), positions.reshape(id_map.shape)


def _check_tables_agree(prediction: PanopticPrediction, area: Mapping[int, int]) -> None:
    unlisted = [i for i, pixels in area.items() if pixels and i != VOID_ID and i not in prediction.labels]
    if unlisted:
        raise InconsistentMapError(f"the predicted map has ids that no segment lists: {unlisted[:5]}")
    empty = [i for i in prediction.labels if not area.get(i)]
    if empty:
        raise InconsistentMapError(f"predicted segments without a pixel: {empty[:5]}")


def _class_quality(iou: float, tp: int, fp: int, fn: int) -> ClassQuality:
    if tp + fp + fn == 0:
        return ClassQuality(0.0, 0.0, 0.0, 0, 0, 0)
    size = tp + 0.5 * fp + 0.5 * fn
    return ClassQuality(iou / size, iou / tp if tp else 0.0, tp / size, tp, fp, fn)


def _average(classes: Sequence[ClassQuality]) -> Quality | None:
    counted = [c for c in classes if c.occurs]
    if not counted:
        return None
    n = len(counted)
    return Quality(sum(c.pq for c in counted) / n, sum(c.sq for c in counted) / n, sum(c.rq for c in counted) / n, n)
