"""Instance AP as Cityscapes defines it (cityscapesScripts, evalInstanceLevelSemanticLabeling.py), as a mergeable state.

It differs from COCO's AP. Thresholds are strict. The number of detections per image is not limited. Detections with
equal scores are one point of the curve, which is integrated in steps. An unmatched detection is ignored if a large
share of it lies on groups of unseparated things, on void or on instances below 100 pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from m2f.data_pipeline.readers.cityscapes import CATEGORIES
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.overlaps import common_runs, compact_ids

OVERLAPS = np.arange(0.5, 1.0, 0.05)
"""IoU thresholds, which a match must exceed."""
MIN_PIXELS = 100
"""Annotated instances with fewer pixels are ignored."""
FIRST_INSTANCE = 1000
"""Smallest id of an instance. Smaller ids are plain label ids: stuff, or a group of things."""
VOID_LABELS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Label ids that are not evaluated."""
THING_LABELS = tuple(c.id for c in CATEGORIES.for_task("instance"))
_BITS = 1 << np.arange(len(OVERLAPS), dtype=np.uint16)
"""Bit of every overlap. Flags of all overlaps are stored in one number."""


@dataclass(frozen=True, eq=False)
class CityscapesDetection:
    """One detected instance."""

    mask: np.ndarray
    """[H, W] bool: pixels of the instance."""
    label: int
    """Label id. Detections whose label is not in THING_LABELS are left out, as in the benchmark."""
    score: float


@dataclass(frozen=True, eq=False)
class CityscapesRecord(Record):
    """Detections of one image, without empty ones. Bit t of `correct` and `wrong` belongs to OVERLAPS[t]."""

    label: np.ndarray = field(metadata=column("int32"))
    score: np.ndarray = field(metadata=column("float64"))
    correct: np.ndarray = field(metadata=column("uint16"))
    wrong: np.ndarray = field(metadata=column("uint16"))
    """Detections that are neither correct nor wrong are ignored."""
    truth_label: np.ndarray = field(metadata=column("int32"))
    """Label of every annotated instance that is not ignored."""


@dataclass(frozen=True)
class CityscapesAP:
    """AP as shares, not per cent; None if no annotated instance is evaluated."""

    ap: float | None
    """Mean over classes and overlaps."""
    ap50: float | None
    per_class: dict[int, tuple[float, float] | None]
    """AP and AP50 by label id."""


class CityscapesAPState(MetricState[CityscapesRecord, CityscapesAP]):
    """Matched detections per image."""

    name = "Cityscapes instance AP"

    def __init__(self) -> None:
        super().__init__(CityscapesRecord, {})

    def update(self, image_id: int, truth: np.ndarray, detections: Iterable[CityscapesDetection]) -> None:
        """Match the detections of one image, one at a time, with `truth`: ids [H, W] as in gtFine_instanceIds.png.

        Raises EvaluationError naming the image if a mask differs in size.
        """
        try:
            self.add(image_id, match_cityscapes(truth, detections))
        except ValueError as error:
            raise EvaluationError(f"image {image_id}: {error}") from error

    def compute(self) -> CityscapesAP:
        """Compute the AP of every class at every overlap, and the means."""
        label, score, truth = self.rows("label"), self.rows("score"), self.rows("truth_label")
        correct, wrong = ((self.rows(name)[:, None] & _BITS) != 0 for name in ("correct", "wrong"))
        table = {}
        for k in THING_LABELS:
            rows, num_truth = label == k, int((truth == k).sum())
            if num_truth:
                curves = zip(correct[rows].T, wrong[rows].T, strict=True)
                table[k] = [_average_precision(score[rows], right, bad, num_truth) for right, bad in curves]
        if not table:
            return CityscapesAP(None, None, dict.fromkeys(THING_LABELS))
        values = np.array(list(table.values()))
        per_class = {k: (float(np.mean(table[k])), table[k][0]) if k in table else None for k in THING_LABELS}
        return CityscapesAP(float(values.mean()), float(values[:, 0].mean()), per_class)


def match_cityscapes(truth: np.ndarray, detections: Iterable[CityscapesDetection]) -> CityscapesRecord:
    """Return true and false positives of one image at every overlap. Raises ValueError if a mask's size differs."""
    values, _, lengths = common_runs(truth, truth)
    ids, run_positions = compact_ids(values)
    positions = run_positions.repeat(lengths).reshape(truth.shape)
    truth_ids, truth_pixels = np.array(ids), np.bincount(positions.ravel(), minlength=len(ids))
    grouped = truth_ids < FIRST_INSTANCE
    truth_label = np.where(grouped, truth_ids, truth_ids // FIRST_INSTANCE)
    counted = ~grouped & (truth_pixels >= MIN_PIXELS)
    void = np.isin(truth_ids, VOID_LABELS)

    candidates = []
    for detection in detections:
        if detection.mask.shape != truth.shape:
            raise ValueError(f"a mask has shape {detection.mask.shape}, but the truth has {truth.shape}")
        shared = np.bincount(positions[detection.mask], minlength=len(ids))
        pixels = int(shared.sum())
        if not pixels or detection.label not in THING_LABELS:
            continue
        same_class = truth_label == detection.label
        # The benchmark counts a small group twice: as a group and as too small.
        ignored = (
            shared[void].sum()
            + shared[same_class & grouped].sum()
            + shared[same_class & (truth_pixels < MIN_PIXELS)].sum()
        )
        iou = np.where(same_class, shared / (truth_pixels + pixels - shared), 0.0)
        candidates.append(_Candidate(detection.label, detection.score, iou, float(ignored) / pixels))
    correct, wrong = _resolve_matches(candidates, counted)
    return CityscapesRecord(
        label=np.array([f.label for f in candidates]),
        score=np.array([f.score for f in candidates]),
        correct=correct @ _BITS,
        wrong=wrong @ _BITS,
        truth_label=truth_label[counted & np.isin(truth_label, THING_LABELS)],
    )


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Detection of an evaluated class with at least one pixel."""

    label: int
    score: float
    iou: np.ndarray
    """IoU with every truth id of its class; 0 for others."""
    ignored: float
    """Share of its pixels in void, groups and small instances."""


def _resolve_matches(candidates: list[_Candidate], counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return flags of true and of false positives, [D, T] each.

    If several detections match an instance, the one with the best score is correct.
    """
    ious = np.array([f.iou for f in candidates]).reshape(len(candidates), len(counted))
    scores, ignored = np.array([f.score for f in candidates]), np.array([f.ignored for f in candidates])
    correct = np.zeros((len(candidates), len(OVERLAPS)), dtype=bool)
    wrong = np.zeros_like(correct)
    for t, overlap in enumerate(OVERLAPS):
        matches = ious > overlap
        wrong[:, t] = (matches & counted).any(axis=1) | (~matches.any(axis=1) & (ignored <= overlap))
        for g in np.flatnonzero((matches & counted).any(axis=0)):
            competing = np.flatnonzero(matches[:, g])
            best = competing[scores[competing].argmax()]
            correct[best, t], wrong[best, t] = True, False
    return correct, wrong


def _average_precision(score: np.ndarray, correct: np.ndarray, wrong: np.ndarray, num_truth: int) -> float:
    """Return the area under the steps of precision over recall.

    The curve has one point per distinct score, and precision 1 at recall 0. The area is 0 if there is no detection, or
    if all detections are ignored.
    """
    counted_detections = correct | wrong
    if not counted_detections.any():
        return 0.0
    order = score[counted_detections].argsort(kind="stable")
    right = correct[counted_detections][order]
    _, first = np.unique(score[counted_detections][order], return_index=True)
    above = np.cumsum(right[::-1])[::-1][first]  # correct detections with at least this score
    precision = above / (len(right) - first)
    recall = above / num_truth
    precision = np.append(precision, 1.0)
    recall = np.concatenate([recall[:1], recall, [0.0, 0.0]])
    return float(precision @ ((recall[:-2] - recall[2:]) / 2))
