"""Cost of each type of error: the AP50 or PQ gained if all errors of one type were fixed.

Types, thresholds and fixes are those of TIDE (Bolya et al., ECCV 2020). The first matching type applies, in the order
localisation, classification, duplicate, background, both. Panoptic segments do not overlap. There, a duplicate has an
IoU from 0.1 to 0.5 with an annotated segment of its class that another prediction matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np

from m2f.eval.metrics.average_precision import precision_at_recalls
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.metrics.rle import mask_ious
from m2f.eval.metrics.segment_errors import Candidates

FOREGROUND_IOU = 0.5
"""Lowest IoU of a correct detection; panoptic segments must exceed it."""
BACKGROUND_IOU = 0.1
"""Highest IoU at which a detection and an annotation count as unrelated."""
MAX_IGNORED = 0.5
"""An unmatched panoptic segment is ignored if a larger share of it than this lies in void and a crowd of its class."""


class ErrorType(IntEnum):
    """Type of error of a detection; MISSED is the type of an annotation."""

    NONE = 0
    """A match."""
    CLASSIFICATION = 1
    """Fits an annotation of another class."""
    LOCALISATION = 2
    """Right class, IoU from 0.1 to 0.5. After the fix it is a match with an IoU of 1."""
    BOTH = 3
    """Another class, and an IoU from 0.1 to 0.5."""
    DUPLICATE = 4
    """Fits an annotation of its class that has a better detection."""
    BACKGROUND = 5
    """IoU of at most 0.1 with all annotations."""
    MISSED = 6
    """Annotation that no detection matches, even if other errors are fixed."""


CORRECTED_TYPES = (ErrorType.CLASSIFICATION, ErrorType.LOCALISATION)
"""Types whose repairable detections become matches when fixed. All other detections are removed when fixed."""


@dataclass(frozen=True, eq=False)
class ErrorRecord(Record):
    """Detections and annotations of one image, without ignored detections and without crowds."""

    label: np.ndarray = field(metadata=column("int32"))
    score: np.ndarray = field(metadata=column("float64"))
    """Score of the detection, descending within a class. For panoptic segments: the largest IoU, in any order."""
    iou: np.ndarray = field(metadata=column("float64"))
    """IoU with the annotation that the detection matches, or would match if fixed; 1 for errors of localisation."""
    kind: np.ndarray = field(metadata=column("uint8"))
    """Value of ErrorType."""
    target: np.ndarray = field(metadata=column("int32"))
    """Class after the fix."""
    repairable: np.ndarray = field(metadata=column("uint8"))
    """1 for the best detection that matches an unmatched annotation once its error is fixed; otherwise 0."""
    truth_label: np.ndarray = field(metadata=column("int32"))
    truth_missed: np.ndarray = field(metadata=column("uint8"))
    """0: matched; 1: MISSED; 2: unmatched, but the target of a detection that can be fixed."""


@dataclass(frozen=True)
class ErrorCosts:
    """Costs as shares, not per cent."""

    metric: Literal["AP50", "PQ"]
    value: float | None
    """The metric without any fix; None if it is undefined."""
    gains: Mapping[str, float]
    """Metric with one type fixed, minus the unfixed metric, by type in lower case. Empty if `value` is None."""
    counts: Mapping[str, int]
    """Number of errors by type in lower case."""
    by_class: np.ndarray
    """[K, types] int64: errors by class of the detection (MISSED: of the annotation). Column NONE holds matches."""


class ErrorState(MetricState[ErrorRecord, ErrorCosts]):
    """Errors per image, of instances (AP50) or panoptic segments (PQ)."""

    name = "error types"

    def __init__(self, num_classes: int, metric: Literal["AP50", "PQ"]) -> None:
        super().__init__(ErrorRecord, {"num_classes": num_classes, "metric": metric})
        self.num_classes = num_classes
        self.metric: Literal["AP50", "PQ"] = metric

    def compute(self) -> ErrorCosts:
        """Compute the metric unfixed, and with each type fixed."""
        kind, label = self.rows("kind"), self.rows("label")
        missed = self.rows("truth_label")[self.rows("truth_missed") == 1]
        by_class = np.zeros((self.num_classes, len(ErrorType)), dtype=np.int64)
        np.add.at(by_class, (label, kind), 1)
        np.add.at(by_class[:, ErrorType.MISSED], missed, 1)
        types = [kind for kind in ErrorType if kind != ErrorType.NONE]
        value = self._corrected(None)
        return ErrorCosts(
            metric=self.metric,
            value=value,
            gains={} if value is None else {t.name.lower(): (self._corrected(t) or 0.0) - value for t in types},
            counts={t.name.lower(): int(by_class[:, t].sum()) for t in types},
            by_class=by_class,
        )

    def _corrected(self, error_type: ErrorType | None) -> float | None:
        """Return the metric with errors of `error_type` fixed; None fixes nothing."""
        kind, target, iou = self.rows("kind"), self.rows("target"), self.rows("iou")
        wrong = np.zeros(len(kind), dtype=bool) if error_type is None else kind == error_type
        corrected = wrong & (self.rows("repairable") == 1) & (error_type in CORRECTED_TYPES)
        kept = corrected | ~wrong
        correct = ((kind == ErrorType.NONE) | corrected)[kept]
        label = np.where(corrected, target, self.rows("label"))[kept]
        truth = self.rows("truth_label")
        if error_type == ErrorType.MISSED:
            truth = truth[self.rows("truth_missed") != 1]
        truth_count = np.bincount(truth, minlength=self.num_classes)
        if self.metric == "AP50":
            return _average_precision(label, self.rows("score")[kept], correct, truth_count)
        return _panoptic_quality(label, np.where(correct, iou[kept], 0), correct, truth_count)


def _average_precision(
    label: np.ndarray, score: np.ndarray, correct: np.ndarray, truth_count: np.ndarray
) -> float | None:
    """Return the mean over the annotated classes, as in COCO; None if there are none."""
    order = np.lexsort((-score, label))
    ends = np.searchsorted(label[order], np.arange(len(truth_count) + 1))
    values = []
    for k in np.flatnonzero(truth_count):
        hits = correct[order[ends[k] : ends[k + 1]]][None]
        values.append(precision_at_recalls(hits, ~hits, int(truth_count[k]))[0].mean())
    return float(np.mean(values)) if values else None


def _panoptic_quality(label: np.ndarray, iou: np.ndarray, correct: np.ndarray, truth_count: np.ndarray) -> float | None:
    """Return the mean over the classes that occur; None if there are none."""
    predicted = np.bincount(label, minlength=len(truth_count))
    matched = np.bincount(label, weights=iou, minlength=len(truth_count))
    size = (predicted + truth_count) / 2  # = TP + FP / 2 + FN / 2
    occurs = size > 0
    return float((matched[occurs] / size[occurs]).mean()) if occurs.any() else None


def instance_errors(truth: InstanceTruth, detections: InstanceDetections, limit: int = 100) -> ErrorRecord:
    """Return the errors of one image, among at most `limit` detections per class, matched as for AP50."""
    order = np.lexsort((-detections.scores, detections.labels))
    labels = detections.labels[order]
    order = order[np.arange(len(labels)) - np.searchsorted(labels, labels) < limit]
    labels, index, not_crowd = detections.labels[order], detections.mask_index[order], ~truth.is_crowd
    overlaps = mask_ious(detections.masks, truth.masks, truth.is_crowd)[index]
    iou, truth_labels = overlaps[:, not_crowd], truth.labels[not_crowd]
    same = labels[:, None] == truth_labels
    is_free = np.ones(len(truth_labels), dtype=bool)
    partner = np.full(len(order), -1)
    for d in np.flatnonzero((same & (iou >= FOREGROUND_IOU)).any(axis=1)):
        free_iou = np.where(is_free & same[d], iou[d], -1.0)
        best = len(free_iou) - 1 - int(free_iou[::-1].argmax())  # among equal IoUs the later one, as in COCO
        if free_iou[best] >= FOREGROUND_IOU:
            is_free[best], partner[d] = False, best
    in_crowd = (overlaps >= FOREGROUND_IOU) & truth.is_crowd & (labels[:, None] == truth.labels)
    counted = (partner >= 0) | ~in_crowd.any(axis=1)
    predictions = _MatchedPredictions(labels, detections.scores[order], iou, iou >= FOREGROUND_IOU, partner)
    return _record(predictions.select(counted), truth_labels, disjoint=False)


def panoptic_errors(segments: Candidates) -> ErrorRecord:
    """Return the errors of one image, with segments matched as for PQ."""
    labels = segments.predicted_labels
    fits = segments.iou > FOREGROUND_IOU
    matches = fits & (labels[:, None] == segments.truth_labels)
    partner = np.where(matches.any(axis=1), matches.argmax(axis=1), -1) if matches.size else np.full(len(labels), -1)
    counted = (partner >= 0) | (segments.ignored <= MAX_IGNORED)
    predictions = _MatchedPredictions(labels, segments.iou.max(axis=1, initial=0), segments.iou, fits, partner)
    return _record(predictions.select(counted), segments.truth_labels, disjoint=True)


class _MatchedPredictions(NamedTuple):
    """Predictions of one image, with their relation to its annotations."""

    labels: np.ndarray
    """[D] int classes."""
    scores: np.ndarray
    """[D] float64 scores."""
    iou: np.ndarray
    """[D, G] float64 IoU of predictions and annotations."""
    fits: np.ndarray
    """[D, G] bool: whether the IoU suffices for a match."""
    partner: np.ndarray
    """[D] int: index of the matched annotation, or -1."""

    def select(self, chosen: np.ndarray) -> _MatchedPredictions:
        """Return the chosen predictions."""
        return _MatchedPredictions(*(side[chosen] for side in self))


def _record(predictions: _MatchedPredictions, truth: np.ndarray, disjoint: bool) -> ErrorRecord:
    """Classify the predictions that are not ignored, given annotated classes `truth` [G].

    `disjoint` is True for panoptic segments, which do not overlap.
    """
    labels, scores, iou, fits, partner = predictions
    is_matched = np.isin(np.arange(len(truth)), partner)
    if not len(truth):
        kind = np.full(len(labels), ErrorType.BACKGROUND)
        no_values = np.zeros(len(labels))
        return ErrorRecord(labels, scores, no_values, kind, labels, no_values, truth, np.zeros(0))
    same = labels[:, None] == truth
    same_class_iou, other_class_iou = np.where(same, iou, 0), np.where(same, 0, iou)
    best_same, best_other = same_class_iou.argmax(axis=1), other_class_iou.argmax(axis=1)
    is_mislocalised = (same_class_iou.max(axis=1) >= BACKGROUND_IOU) & (same_class_iou.max(axis=1) <= FOREGROUND_IOU)
    is_duplicate = is_mislocalised & is_matched[best_same] if disjoint else (same & fits & is_matched).any(axis=1)
    fits_other_class = (fits & ~same).any(axis=1)
    is_mislocalised &= ~(is_duplicate & disjoint)
    conditions = (
        (ErrorType.NONE, partner >= 0),
        (ErrorType.LOCALISATION, is_mislocalised),
        (ErrorType.CLASSIFICATION, fits_other_class),
        (ErrorType.DUPLICATE, is_duplicate),
        (ErrorType.BACKGROUND, iou.max(axis=1) <= BACKGROUND_IOU),
    )
    kind = np.select([condition for _, condition in conditions], [kind for kind, _ in conditions], ErrorType.BOTH)
    target = np.select([kind == ErrorType.NONE, kind == ErrorType.CLASSIFICATION], [partner, best_other], best_same)
    target_is_free = np.isin(kind, CORRECTED_TYPES) & ~is_matched[target]
    repairable = np.zeros(len(labels), dtype=bool)
    taken: set[int] = set()
    for d in np.argsort(-scores, kind="stable"):
        if target_is_free[d] and int(target[d]) not in taken:
            taken.add(int(target[d]))
            repairable[d] = True
    corrected_iou = np.where(kind == ErrorType.LOCALISATION, 1.0, iou[np.arange(len(labels)), target])
    missed = np.where(is_matched, 0, np.where(np.isin(np.arange(len(truth)), list(taken)), 2, 1))
    return ErrorRecord(labels, scores, corrected_iou, kind, truth[target], repairable, truth, missed)
