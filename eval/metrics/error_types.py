"""How much each type of error costs: the AP50 or PQ that would be gained if all errors of one type were repaired.

Types, thresholds and repairs are those of TIDE (Bolya et al., ECCV 2020): the first type that holds of localisation,
classification, duplicate, background and both. Panoptic segments do not overlap, so a duplicate there is a segment
that fits badly to a segment of its class which another one fits.
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
"""From this IoU on a detection is right."""
BACKGROUND_IOU = 0.1
"""Up to this IoU a detection has nothing to do with an annotation."""
MAX_IGNORED = 0.5
"""A false detection with more of itself in crowds (or void) does not count."""


class ErrorType(IntEnum):
    """Of a detection; MISSED is of an annotation."""

    NONE = 0
    CLASSIFICATION = 1
    """Fits an annotation of another class."""
    LOCALISATION = 2
    """Right class, IoU from 0.1 to 0.5. Repaired, it is a match with an IoU of 1."""
    BOTH = 3
    """Another class, and IoU from 0.1 to 0.5."""
    DUPLICATE = 4
    """Fits an annotation of its class that has a better detection."""
    BACKGROUND = 5
    """IoU of at most 0.1 with all annotations."""
    MISSED = 6
    """No detection, also none that a repair would make fit."""


REPAIRED = (ErrorType.CLASSIFICATION, ErrorType.LOCALISATION)
"""Errors whose detections become matches; those of the other types are removed."""


@dataclass(frozen=True, eq=False)
class ErrorRecord(Record):
    """Detections that count and annotations without crowds of one image."""

    label: np.ndarray = field(metadata=column("int32"))
    score: np.ndarray = field(metadata=column("float64"))
    """Best first inside a class; of panoptic segments their largest IoU."""
    iou: np.ndarray = field(metadata=column("float64"))
    """With the annotation that it matches, or would match with the right class; 1 for errors of localisation."""
    kind: np.ndarray = field(metadata=column("uint8"))
    """ErrorType."""
    target: np.ndarray = field(metadata=column("int32"))
    """Class after the repair."""
    repairable: np.ndarray = field(metadata=column("uint8"))
    """1: the best detection for an annotation without match; others are removed with their type."""
    truth_label: np.ndarray = field(metadata=column("int32"))
    truth_missed: np.ndarray = field(metadata=column("uint8"))
    """0: matched; 1: MISSED; 2: unmatched, but the target of a repairable detection."""


@dataclass(frozen=True)
class ErrorCosts:
    """Shares, not per cent."""

    metric: Literal["AP50", "PQ"]
    value: float | None
    """As it is; None where nothing counts."""
    gains: Mapping[str, float]
    """By type in lower case: the metric without errors of this type, less the metric as it is. Empty without value."""
    counts: Mapping[str, int]
    """Errors by type."""
    by_class: np.ndarray
    """[K, types] int64 errors by the class of the detection, MISSED by that of the annotation; column NONE: matches."""


class ErrorState(MetricState[ErrorRecord, ErrorCosts]):
    """Errors per image of instances (AP50) or of panoptic segments (PQ)."""

    name = "error types"

    def __init__(self, num_classes: int, metric: Literal["AP50", "PQ"]) -> None:
        super().__init__(ErrorRecord, {"num_classes": num_classes, "metric": metric})
        self.num_classes = num_classes
        self.metric: Literal["AP50", "PQ"] = metric

    def compute(self) -> ErrorCosts:
        """The metric as it is, and repaired type by type."""
        kind, label = self.rows("kind"), self.rows("label")
        missed = self.rows("truth_label")[self.rows("truth_missed") == 1]
        by_class = np.zeros((self.num_classes, len(ErrorType)), dtype=np.int64)
        np.add.at(by_class, (label, kind), 1)
        np.add.at(by_class[:, ErrorType.MISSED], missed, 1)
        types = [kind for kind in ErrorType if kind != ErrorType.NONE]
        value = self._repaired(None)
        return ErrorCosts(
            metric=self.metric,
            value=value,
            gains={} if value is None else {t.name.lower(): (self._repaired(t) or 0.0) - value for t in types},
            counts={t.name.lower(): int(by_class[:, t].sum()) for t in types},
            by_class=by_class,
        )

    def _repaired(self, repaired: ErrorType | None) -> float | None:
        """The metric without errors of a type."""
        kind, target, iou = self.rows("kind"), self.rows("target"), self.rows("iou")
        wrong = np.zeros(len(kind), dtype=bool) if repaired is None else kind == repaired
        mended = wrong & (self.rows("repairable") == 1) & (repaired in REPAIRED)
        kept = mended | ~wrong
        correct = ((kind == ErrorType.NONE) | mended)[kept]
        label = np.where(mended, target, self.rows("label"))[kept]
        truth = self.rows("truth_label")
        if repaired == ErrorType.MISSED:
            truth = truth[self.rows("truth_missed") != 1]
        truth_count = np.bincount(truth, minlength=self.num_classes)
        if self.metric == "AP50":
            return _average_precision(label, self.rows("score")[kept], correct, truth_count)
        return _panoptic_quality(label, np.where(correct, iou[kept], 0), correct, truth_count)


def _average_precision(
    label: np.ndarray, score: np.ndarray, correct: np.ndarray, truth_count: np.ndarray
) -> float | None:
    """Mean over the annotated classes, as COCO has it; None without one."""
    order = np.lexsort((-score, label))
    ends = np.searchsorted(label[order], np.arange(len(truth_count) + 1))
    values = []
    for k in np.flatnonzero(truth_count):
        hits = correct[order[ends[k] : ends[k + 1]]][None]
        values.append(precision_at_recalls(hits, ~hits, int(truth_count[k]))[0].mean())
    return float(np.mean(values)) if values else None


def _panoptic_quality(label: np.ndarray, iou: np.ndarray, correct: np.ndarray, truth_count: np.ndarray) -> float | None:
    """Mean over the classes that occur; None without one."""
    predicted = np.bincount(label, minlength=len(truth_count))
    matched = np.bincount(label, weights=iou, minlength=len(truth_count))
    size = (predicted + truth_count) / 2  # = TP + FP / 2 + FN / 2
    occurs = size > 0
    return float((matched[occurs] / size[occurs]).mean()) if occurs.any() else None


def instance_errors(truth: InstanceTruth, detections: InstanceDetections, limit: int = 100) -> ErrorRecord:
    """Errors of one image among at most `limit` detections per class, matched as for AP50."""
    order = np.lexsort((-detections.scores, detections.labels))
    labels = detections.labels[order]
    order = order[np.arange(len(labels)) - np.searchsorted(labels, labels) < limit]
    labels, index, ordinary = detections.labels[order], detections.mask_index[order], ~truth.is_crowd
    overlaps = mask_ious(detections.masks, truth.masks, truth.is_crowd)[index]
    iou, truth_labels = overlaps[:, ordinary], truth.labels[ordinary]
    same = labels[:, None] == truth_labels
    free = np.ones(len(truth_labels), dtype=bool)
    partner = np.full(len(order), -1)
    for d in np.flatnonzero((same & (iou >= FOREGROUND_IOU)).any(axis=1)):
        open_iou = np.where(free & same[d], iou[d], -1.0)
        best = len(open_iou) - 1 - int(open_iou[::-1].argmax())  # of equals the later one, as in COCO
        if open_iou[best] >= FOREGROUND_IOU:
            free[best], partner[d] = False, best
    in_crowd = (overlaps >= FOREGROUND_IOU) & truth.is_crowd & (labels[:, None] == truth.labels)
    counts = (partner >= 0) | ~in_crowd.any(axis=1)
    found = _Judged(labels, detections.scores[order], iou, iou >= FOREGROUND_IOU, partner)
    return _record(found.where(counts), truth_labels, disjoint=False)


def panoptic_errors(segments: Candidates) -> ErrorRecord:
    """Errors of one image."""
    labels = segments.predicted_labels
    fits = segments.iou > FOREGROUND_IOU
    matches = fits & (labels[:, None] == segments.truth_labels)
    partner = np.where(matches.any(axis=1), matches.argmax(axis=1), -1) if matches.size else np.full(len(labels), -1)
    counts = (partner >= 0) | (segments.ignored <= MAX_IGNORED)
    found = _Judged(labels, segments.iou.max(axis=1, initial=0), segments.iou, fits, partner)
    return _record(found.where(counts), segments.truth_labels, disjoint=True)


class _Judged(NamedTuple):
    """Predictions of one image beside its annotations."""

    labels: np.ndarray
    """[D] int"""
    scores: np.ndarray
    """[D] float64"""
    iou: np.ndarray
    """[D, G] float64"""
    fits: np.ndarray
    """[D, G] bool whether the IoU is enough for a match."""
    partner: np.ndarray
    """[D] int annotation that each matches, or -1."""

    def where(self, chosen: np.ndarray) -> _Judged:
        """Those of the predictions."""
        return _Judged(*(side[chosen] for side in self))


def _record(found: _Judged, truth: np.ndarray, disjoint: bool) -> ErrorRecord:
    """Types of predictions that all count, given the classes [G] of the annotations; `disjoint`: panoptic segments."""
    labels, scores, iou, fits, partner = found
    used = np.isin(np.arange(len(truth)), partner)
    if not len(truth):
        kind = np.full(len(labels), ErrorType.BACKGROUND)
        nothing = np.zeros(len(labels))
        return ErrorRecord(labels, scores, nothing, kind, labels, nothing, truth, np.zeros(0))
    same = labels[:, None] == truth
    own, foreign = np.where(same, iou, 0), np.where(same, 0, iou)
    nearest, closest = own.argmax(axis=1), foreign.argmax(axis=1)
    misplaced = (own.max(axis=1) >= BACKGROUND_IOU) & (own.max(axis=1) <= FOREGROUND_IOU)
    twice = misplaced & used[nearest] if disjoint else (same & fits & used).any(axis=1)
    fits_another = (fits & ~same).any(axis=1)
    misplaced &= ~(twice & disjoint)
    kinds = (
        (ErrorType.NONE, partner >= 0),
        (ErrorType.LOCALISATION, misplaced),
        (ErrorType.CLASSIFICATION, fits_another),
        (ErrorType.DUPLICATE, twice),
        (ErrorType.BACKGROUND, iou.max(axis=1) <= BACKGROUND_IOU),
    )
    kind = np.select([holds for _, holds in kinds], [kind for kind, _ in kinds], ErrorType.BOTH)
    goal = np.select([kind == ErrorType.NONE, kind == ErrorType.CLASSIFICATION], [partner, closest], nearest)
    open_goal = np.isin(kind, REPAIRED) & ~used[goal]
    repairable = np.zeros(len(labels), dtype=bool)
    taken: set[int] = set()
    for d in np.argsort(-scores, kind="stable"):
        if open_goal[d] and int(goal[d]) not in taken:
            taken.add(int(goal[d]))
            repairable[d] = True
    reached = np.where(kind == ErrorType.LOCALISATION, 1.0, iou[np.arange(len(labels)), goal])
    missed = np.where(used, 0, np.where(np.isin(np.arange(len(truth)), list(taken)), 2, 1))
    return ErrorRecord(labels, scores, reached, kind, truth[goal], repairable, truth, missed)
