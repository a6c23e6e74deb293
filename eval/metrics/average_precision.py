"""Mask average precision as COCO defines it (pycocotools' COCOeval for segmentations), as a mergeable state.

Results are bit-identical to pycocotools'. Two choices that pycocotools leaves to its input are fixed. The size of a
detection is always its number of pixels, never a box. Annotations need no ids, whereas pycocotools loses the match of
an annotation with id 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState
from m2f.eval.metrics.instance_matching import (
    AREA_BOUNDS,
    IOU_THRESHOLDS,
    NUM_AREAS,
    DetectionRecord,
    InstanceDetections,
    InstanceTruth,
    area_ranges,
    match_instances,
    rank_in_image_and_class,
)

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
"""Recall thresholds of pycocotools, computed in the same way."""
_THRESHOLD_BITS = 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)
"""Bit of every IoU threshold. Flags of all thresholds are stored in one number."""


@dataclass(frozen=True)
class AveragePrecision:
    """Results of COCOeval.accumulate and summarize; -1 marks a class or area range without annotations."""

    max_dets: tuple[int, ...]
    precision: np.ndarray
    """[thresholds, recalls, classes, areas, max_dets] float64."""
    recall: np.ndarray
    """[thresholds, classes, areas, max_dets] float64."""

    @property
    def stats(self) -> dict[str, float]:
        """COCO's 12 metrics in their order; -1 if undefined. AP is at the largest `max_dets`."""
        return self.stats_at(self.max_dets[-1])

    def stats_at(self, limit: int) -> dict[str, float]:
        """Return COCO's metrics, with AP and recall by size at `limit`, which must be one of `max_dets`."""
        areas = {"": 0, "s": 1, "m": 2, "l": 3}
        last = self.max_dets.index(limit)
        values = {"AP": _mean(self.precision[..., 0, last])}
        values |= {f"AP{t}": _mean(self.precision[i, ..., 0, last]) for t, i in ((50, 0), (75, 5))}
        values |= {f"AP{size}": _mean(self.precision[..., a, last]) for size, a in areas.items() if size}
        values |= {f"AR{count}": _mean(self.recall[..., 0, m]) for m, count in enumerate(self.max_dets)}
        return values | {f"AR{size}": _mean(self.recall[..., a, last]) for size, a in areas.items() if size}

    def class_stats(self, label: int) -> dict[str, float]:
        """Return the numbers of `stats` for one class; -1 if undefined."""
        chosen = slice(label, label + 1)
        return AveragePrecision(self.max_dets, self.precision[:, :, chosen], self.recall[:, chosen]).stats

    @property
    def per_class(self) -> tuple[float, ...]:
        """AP of every class over all areas; -1 for a class without annotations."""
        return tuple(_mean(self.precision[:, :, k, 0, -1]) for k in range(self.precision.shape[2]))


class AveragePrecisionState(MetricState[DetectionRecord, AveragePrecision]):
    """Matched detections per image. `max_dets` limits detections per image and class, as in COCO.

    With `boundary_ratio` (see `m2f.eval.metrics.boundary`) the metric is Boundary AP. `area_bounds` holds the smallest
    area of a medium and of a large instance, in pixels.
    """

    name = "average precision"

    def __init__(
        self,
        num_classes: int,
        max_dets: Sequence[int] = (1, 10, 100),
        boundary_ratio: float | None = None,
        area_bounds: Sequence[float] = AREA_BOUNDS,
    ) -> None:
        settings: dict[str, Any] = {
            "num_classes": num_classes,
            "max_dets": sorted(max_dets),
            "boundary_ratio": boundary_ratio,
        }
        if tuple(area_bounds) != AREA_BOUNDS:  # saved states without this entry use the default
            settings["area_bounds"] = list(area_bounds)
        super().__init__(DetectionRecord, settings)
        self.num_classes = num_classes
        self.max_dets = tuple(sorted(max_dets))
        self.boundary_ratio = boundary_ratio
        self.area_bounds = tuple(area_bounds)

    def update(self, image_id: int, truth: InstanceTruth, detections: InstanceDetections) -> None:
        """Match the detections of one image.

        Raises EvaluationError for a score that is not finite, masks of different sizes, and a class out of range.
        """
        if not np.isfinite(detections.scores).all():
            raise EvaluationError(
                f"image {image_id}: a detection's score is not finite; if it comes from a checkpoint, the "
                "weights have overflowed: evaluate an earlier checkpoint"
            )
        sizes = {tuple(mask["size"]) for mask in (*truth.masks, *detections.masks)}
        if len(sizes) > 1:
            raise EvaluationError(f"image {image_id}: the masks differ in size: {sorted(sizes)}")
        for side, labels in (("truth", truth.labels), ("prediction", detections.labels)):
            if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise EvaluationError(
                    f"image {image_id}: the {side} has classes from {labels.min()} to {labels.max()}, "
                    f"outside 0..{self.num_classes - 1}"
                )
        limit, ranges = self.max_dets[-1], area_ranges(self.area_bounds)
        self.add(image_id, match_instances(truth, detections, limit, self.boundary_ratio, ranges))

    def compute(self) -> AveragePrecision:
        """Compute precision at all recalls and final recall by threshold, class, area range and detection limit."""
        shape = (self.num_classes, NUM_AREAS, len(self.max_dets))
        precision = -np.ones((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), *shape))
        recall = -np.ones((len(IOU_THRESHOLDS), *shape))
        truth_count = np.zeros((self.num_classes, NUM_AREAS), dtype=np.int64)
        np.add.at(truth_count, self.rows("truth_label"), self.rows("truth_count"))

        label, score = self.rows("label"), self.rows("score")
        matched, ignored = self.rows("matched"), self.rows("ignored")
        rank = rank_in_image_and_class(label, self.row_counts("label"))
        # Group by class, best first. Both sorts are stable, so equal scores stay in ascending image id.
        order = np.lexsort((-score, label))
        starts = np.searchsorted(label[order], np.arange(self.num_classes + 1))
        for k in range(self.num_classes):
            rows = order[starts[k] : starts[k + 1]]
            max_rank = rank[rows].max(initial=-1)
            for m, limit in enumerate(self.max_dets):
                if m and max_rank < self.max_dets[m - 1]:  # no image has more detections than the previous limit
                    precision[:, :, k, :, m], recall[:, k, :, m] = precision[:, :, k, :, m - 1], recall[:, k, :, m - 1]
                    continue
                kept = rows[rank[rows] < limit]
                # Unpack flags of one class at a time; all of them would take forty bytes per detection, twice.
                correct, wrong = (_unpack(hits[kept] & ~ignored[kept]) for hits in (matched, ~matched))
                for a in np.flatnonzero(truth_count[k]):
                    curve = precision_at_recalls(correct[a], wrong[a], int(truth_count[k, a]))
                    precision[:, :, k, a, m], recall[:, k, a, m] = curve
        return AveragePrecision(self.max_dets, precision, recall)


def _unpack(bits: np.ndarray) -> np.ndarray:
    """Convert bit masks [D, A] to flags [A, T, D]."""
    return (bits.T[:, None] & _THRESHOLD_BITS[:, None]) != 0


def precision_at_recalls(correct: np.ndarray, wrong: np.ndarray, num_truth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return interpolated precision [T, R] and final recall [T] from flags [T, D] of detections in descending score."""
    # Recall increases, and precision has its maxima, only at correct detections, so only these are evaluated.
    threshold, position = correct.nonzero()
    hits = np.bincount(threshold, minlength=len(correct))
    tp = np.arange(1.0, hits.max(initial=0) + 1)
    fp = np.zeros((len(correct), len(tp)))
    fp[np.arange(len(tp)) < hits[:, None]] = wrong.cumsum(axis=1, dtype=np.int32)[threshold, position]
    precision = tp / (fp + tp + np.spacing(1))
    precision[np.arange(len(tp)) >= hits[:, None]] = 0
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    first = np.searchsorted(tp / num_truth, RECALL_THRESHOLDS, side="left")
    sampled = np.zeros((len(correct), len(RECALL_THRESHOLDS)))
    reached = first < len(tp)
    sampled[:, reached] = envelope[:, first[reached]]
    return sampled, hits / num_truth


def _mean(values: np.ndarray) -> float:
    """Return the mean over defined values, added in pycocotools' order; -1 if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
