"""Mask average precision as COCO defines it (pycocotools' COCOeval for segmentations), as a mergeable state.

Equal to pycocotools bit for bit, with three exact shortcuts: only detections that overlap some annotation by at least
the lowest threshold enter the matching, all thresholds and area ranges are matched at once, and the monotone
precision envelope is one accumulate. Two things are fixed here that pycocotools leaves to its input: the size of a
detection is always its number of pixels (never a box), and annotations need no ids (there an id of 0 loses a match).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.boundary import mask_boundaries
from m2f.eval.metrics.rle import Rle, mask_areas, mask_ious

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
"""Thresholds of pycocotools, computed as it does."""
AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Pixels, closed on both sides: an area of 1024 is small and medium."""
NUM_AREAS = len(AREA_RANGES)
AREA_BOUNDS = (32.0**2, 96.0**2)
"""Pixels from which on COCO calls an instance medium, and large."""
_THRESHOLD_BITS = 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)
"""A bit per IoU threshold: flags of all thresholds travel as one number."""
_ALL_THRESHOLDS = np.uint16(_THRESHOLD_BITS.sum())
_EVERY_RANGE = 1 << np.arange(NUM_AREAS, dtype=np.int64) * len(IOU_THRESHOLDS)
"""The lowest bit of every area range in a set of (area range, threshold)."""
_FIRST_THRESHOLDS = _EVERY_RANGE.sum() * ((1 << np.arange(len(IOU_THRESHOLDS) + 1, dtype=np.int64)) - 1)
"""By number of thresholds: that many, the lowest, of every range."""


@dataclass(frozen=True)
class InstanceTruth:
    """Annotated instances of one image, in the order of the annotation."""

    masks: tuple[Rle, ...]
    labels: np.ndarray
    """[G] int64 contiguous classes."""
    areas: np.ndarray
    """[G] float64 as the annotation states them."""
    is_crowd: np.ndarray
    """[G] bool"""


@dataclass(frozen=True)
class InstanceDetections:
    """Detections of one image in canonical order (ties of scores keep it). Detections may share a mask."""

    masks: tuple[Rle, ...]
    """One per distinct mask."""
    mask_index: np.ndarray
    """[D] int64 into masks."""
    labels: np.ndarray
    """[D] int64 contiguous classes."""
    scores: np.ndarray
    """[D] float64"""


@dataclass(frozen=True, eq=False)
class DetectionRecord(Record):
    """Detections of one image, class by class and best first; bit t of a mask belongs to IOU_THRESHOLDS[t]."""

    label: np.ndarray = field(metadata=column("int32"))
    score: np.ndarray = field(metadata=column("float64"))
    matched: np.ndarray = field(metadata=column("uint16", NUM_AREAS))
    """Matched to an annotation, per area range."""
    ignored: np.ndarray = field(metadata=column("uint16", NUM_AREAS))
    """Neither right nor wrong, per area range."""
    truth_label: np.ndarray = field(metadata=column("int32"))
    """Classes with annotations, ascending."""
    truth_count: np.ndarray = field(metadata=column("int32", NUM_AREAS))
    """Their annotations that count, per area range."""


@dataclass(frozen=True)
class AveragePrecision:
    """What COCOeval.accumulate and summarize give; -1 marks a class or a range without annotations."""

    max_dets: tuple[int, ...]
    precision: np.ndarray
    """[thresholds, recalls, classes, areas, max_dets] float64"""
    recall: np.ndarray
    """[thresholds, classes, areas, max_dets] float64"""

    @property
    def stats(self) -> dict[str, float]:
        """The 12 numbers of COCO in their order; -1 where undefined. AP is at the largest `max_dets`."""
        return self.stats_at(self.max_dets[-1])

    def stats_at(self, limit: int) -> dict[str, float]:
        """The numbers of COCO with AP, and recall by size, at one of `max_dets`."""
        areas = {"": 0, "s": 1, "m": 2, "l": 3}
        last = self.max_dets.index(limit)
        values = {"AP": _mean(self.precision[..., 0, last])}
        values |= {f"AP{t}": _mean(self.precision[i, ..., 0, last]) for t, i in ((50, 0), (75, 5))}
        values |= {f"AP{size}": _mean(self.precision[..., a, last]) for size, a in areas.items() if size}
        values |= {f"AR{count}": _mean(self.recall[..., 0, m]) for m, count in enumerate(self.max_dets)}
        return values | {f"AR{size}": _mean(self.recall[..., a, last]) for size, a in areas.items() if size}

    def class_stats(self, label: int) -> dict[str, float]:
        """The numbers of `stats` for one class; -1 where undefined."""
        at = slice(label, label + 1)
        return AveragePrecision(self.max_dets, self.precision[:, :, at], self.recall[:, at]).stats

    @property
    def per_class(self) -> tuple[float, ...]:
        """AP of every class over all areas; -1 where it has no annotation."""
        return tuple(_mean(self.precision[:, :, k, 0, -1]) for k in range(self.precision.shape[2]))


class AveragePrecisionState(MetricState[DetectionRecord, AveragePrecision]):
    """Matched detections per image. `max_dets` limits detections per image and class, as in COCO.

    With a `boundary_ratio` (see `m2f.eval.metrics.boundary`) it is Boundary AP. `area_bounds`: pixels from which on an
    instance is medium, and large.
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
        if tuple(area_bounds) != AREA_BOUNDS:  # states of before know no other ones
            settings["area_bounds"] = list(area_bounds)
        super().__init__(DetectionRecord, settings)
        self.num_classes = num_classes
        self.max_dets = tuple(sorted(max_dets))
        self.boundary_ratio = boundary_ratio
        self.area_bounds = tuple(area_bounds)

    def update(self, image_id: int, truth: InstanceTruth, detections: InstanceDetections) -> None:
        """Match the detections of one image. Raises EvaluationError naming it for scores, sizes or classes amiss."""
        if not np.isfinite(detections.scores).all():
            raise EvaluationError(
                f"image {image_id}: a detection's score is not finite; the checkpoint's weights have overflowed, "
                "evaluate an earlier one"
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
        """Precision at all recalls and final recall, for all thresholds, classes, areas and detection limits."""
        shape = (self.num_classes, NUM_AREAS, len(self.max_dets))
        precision = -np.ones((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), *shape))
        recall = -np.ones((len(IOU_THRESHOLDS), *shape))
        truth_count = np.zeros((self.num_classes, NUM_AREAS), dtype=np.int64)
        np.add.at(truth_count, self.rows("truth_label"), self.rows("truth_count"))

        label, score = self.rows("label"), self.rows("score")
        matched, ignored = self.rows("matched"), self.rows("ignored")
        rank = _rank_in_image_and_class(label, self.row_counts("label"))
        # Classes together, best first; both sorts are stable, so ties stay in ascending image id.
        order = np.lexsort((-score, label))
        starts = np.searchsorted(label[order], np.arange(self.num_classes + 1))
        for k in range(self.num_classes):
            rows = order[starts[k] : starts[k + 1]]
            # Flags of one class at a time: for all of them they would be forty bytes per detection, twice.
            correct, wrong = (_unpack(hits[rows] & ~ignored[rows]) for hits in (matched, ~matched))
            for m, limit in enumerate(self.max_dets):
                kept = rank[rows] < limit
                for a in np.flatnonzero(truth_count[k]):
                    curve = precision_at_recalls(correct[a][:, kept], wrong[a][:, kept], int(truth_count[k, a]))
                    precision[:, :, k, a, m], recall[:, k, a, m] = curve
        return AveragePrecision(self.max_dets, precision, recall)


def area_ranges(bounds: Sequence[float] = AREA_BOUNDS) -> np.ndarray:
    """[NUM_AREAS, 2] pixels, closed on both sides: all, small, medium, large; `bounds`: where the last two begin."""
    medium, large = bounds
    most = AREA_RANGES["all"][1]
    return np.array([(0.0, most), (0.0, medium), (medium, large), (large, most)])


def match_instances(
    truth: InstanceTruth,
    detections: InstanceDetections,
    limit: int,
    boundary_ratio: float | None = None,
    ranges: np.ndarray | None = None,
) -> DetectionRecord:
    """Greedy matching of one image by the IoU of masks, at most `limit` detections per class; see `match_by_iou`.

    With a `boundary_ratio` the IoU is the smaller one of masks and of boundaries, except for crowds.
    """
    ious = _ious_of_classes(truth, detections)
    if boundary_ratio is not None:
        ious = _with_boundaries(ious, truth, detections, boundary_ratio)
    index = detections.mask_index
    found = Scored(detections.labels, detections.scores, mask_areas(detections.masks)[index], ious[index])
    return match_by_iou(truth.labels, truth.areas, truth.is_crowd, found, limit, ranges)


@dataclass(frozen=True)
class Scored:
    """Detections of one image with what matching needs of them, in canonical order (ties of scores keep it)."""

    labels: np.ndarray
    """[D] int64 contiguous classes."""
    scores: np.ndarray
    """[D] float64"""
    areas: np.ndarray
    """[D] float64 pixels."""
    ious: np.ndarray
    """[D, G] float64; for crowds the intersection over the detection."""


def match_by_iou(
    truth_label: np.ndarray,
    truth_area: np.ndarray,
    is_crowd: np.ndarray,
    detections: Scored,
    limit: int,
    ranges: np.ndarray | None = None,
) -> DetectionRecord:
    """Greedy matching of one image, best score first, at most `limit` detections per class.

    A detection takes the free annotation with the highest IoU (the later one of equals); annotations that count go
    before ignored ones; a crowd can be taken any number of times. Annotations [G]; `ranges` as `area_ranges` gives.
    """
    bounds = area_ranges() if ranges is None else ranges
    order = np.lexsort((-detections.scores, detections.labels))
    labels = detections.labels[order]
    order = order[_rank_in_image_and_class(labels, np.array([len(labels)])) < limit]
    labels, ious = detections.labels[order], detections.ious[order]

    truth_ignored = is_crowd | _outside(truth_area, bounds)
    matched, ignored = _match(np.where(labels[:, None] == truth_label, ious, 0.0), is_crowd, truth_ignored)
    ignored |= np.where(_outside(detections.areas[order], bounds).T, ~matched & _ALL_THRESHOLDS, np.uint16(0))

    truth_labels, position = np.unique(truth_label, return_inverse=True)
    counted = np.zeros((len(truth_labels), NUM_AREAS), dtype=np.int32)
    np.add.at(counted, position, (~truth_ignored).T)
    return DetectionRecord(
        label=labels,
        score=detections.scores[order],
        matched=matched,
        ignored=ignored,
        truth_label=truth_labels,
        truth_count=counted,
    )


def _ious_of_classes(truth: InstanceTruth, detections: InstanceDetections) -> np.ndarray:
    """IoU [masks, G] of masks and annotations that have a class in common, 0 for the others."""
    ious = np.zeros((len(detections.masks), len(truth.masks)))
    for label in np.intersect1d(truth.labels, detections.labels).tolist():
        rows = np.unique(detections.mask_index[detections.labels == label])
        columns = np.flatnonzero(truth.labels == label)
        masks = [detections.masks[i] for i in rows.tolist()]
        annotated = [truth.masks[i] for i in columns.tolist()]
        ious[np.ix_(rows, columns)] = mask_ious(masks, annotated, truth.is_crowd[columns])
    return ious


def _with_boundaries(
    ious: np.ndarray, truth: InstanceTruth, detections: InstanceDetections, ratio: float
) -> np.ndarray:
    """IoU [masks, G] of masks and boundaries, from that of masks. Pairs too far apart to match keep theirs."""
    near = (ious >= IOU_THRESHOLDS[0]) & ~truth.is_crowd
    found, annotated = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    boundary_ious = mask_ious(
        mask_boundaries([detections.masks[i] for i in found], ratio),
        mask_boundaries([truth.masks[i] for i in annotated], ratio),
        np.zeros(len(annotated), dtype=bool),
    )
    smaller = ious.copy()
    pairs = np.ix_(found, annotated)
    smaller[pairs] = np.where(near[pairs], np.minimum(ious[pairs], boundary_ious), ious[pairs])
    return smaller


def class_agnostic_truth(truth: InstanceTruth) -> InstanceTruth:
    """All instances as one class, in the order that pycocotools takes them with `useCats=0`: class by class."""
    order = truth.labels.argsort(kind="stable")
    masks = tuple(truth.masks[i] for i in order)
    return InstanceTruth(masks, np.zeros_like(truth.labels), truth.areas[order], truth.is_crowd[order])


def class_agnostic_detections(detections: InstanceDetections) -> InstanceDetections:
    """All detections as one class; of equal scores the lower class goes first, as in pycocotools with `useCats=0`."""
    order = detections.labels.argsort(kind="stable")
    labels = np.zeros_like(detections.labels)
    return InstanceDetections(detections.masks, detections.mask_index[order], labels, detections.scores[order])


def _match(ious: np.ndarray, is_crowd: np.ndarray, truth_ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matched and ignored bits [D, A] uint16 from IoU [D, G], crowd flags [G] and ignored flags [A, G].

    Sets of (area range, threshold) are bits of one whole number, 10 for every range, so that a detection costs a few
    operations for each annotation that it overlaps enough.
    """
    bits = len(IOU_THRESHOLDS)
    d, g = np.nonzero(ious >= IOU_THRESHOLDS[0])
    order = np.lexsort((-g, -ious[d, g], d))  # of a detection the highest IoU first, the later one of equals
    d, g = d[order], g[order]
    reached = _FIRST_THRESHOLDS[np.searchsorted(IOU_THRESHOLDS, ious[d, g], side="right")].tolist()
    counts = (_EVERY_RANGE @ ~truth_ignored * ((1 << bits) - 1)).tolist()
    everything = (1 << bits * NUM_AREAS) - 1
    free, crowds = [everything] * len(is_crowd), is_crowd.tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for detection, truth, passed in zip(d.tolist(), g.tolist(), reached, strict=True):
        found.setdefault(detection, []).append((truth, passed))

    matched, ignored = [0] * len(ious), [0] * len(ious)
    for detection, candidates in found.items():
        open_bits = everything
        for counting in (True, False):  # those that count go before ignored ones
            for truth, passed in candidates:
                allowed = counts[truth] if counting else everything ^ counts[truth]
                taken = open_bits & passed & allowed & (everything if crowds[truth] else free[truth])
                free[truth] &= ~taken
                open_bits ^= taken
                if not counting:
                    ignored[detection] |= taken
        matched[detection] = everything ^ open_bits
    return _by_range(matched), _by_range(ignored)


def _by_range(sets: list[int]) -> np.ndarray:
    """Sets of (area range, threshold) as bits of thresholds [D, A] uint16."""
    shifts = np.arange(NUM_AREAS) * len(IOU_THRESHOLDS)
    return (np.array(sets, dtype=np.int64)[:, None] >> shifts & int(_ALL_THRESHOLDS)).astype(np.uint16)


def _outside(areas: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[A, N] whether each area lies outside each range."""
    return (areas < bounds[:, :1]) | (areas > bounds[:, 1:])


def _rank_in_image_and_class(label: np.ndarray, per_image: np.ndarray) -> np.ndarray:
    """Position of each row within its run of equal image and class; rows are sorted by class inside an image."""
    if not len(label):
        return np.zeros(0, dtype=np.int64)
    image = np.repeat(np.arange(len(per_image)), per_image)
    new = np.concatenate([[True], (label[1:] != label[:-1]) | (image[1:] != image[:-1])])
    rows = np.arange(len(label))
    return rows - np.maximum.accumulate(np.where(new, rows, 0))


def _unpack(bits: np.ndarray) -> np.ndarray:
    """Bit masks [D, A] as flags [A, T, D]."""
    return (bits.T[:, None] & _THRESHOLD_BITS[:, None]) != 0


def precision_at_recalls(correct: np.ndarray, wrong: np.ndarray, num_truth: int) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated precision [T, R] and final recall [T] from flags [T, D] of detections in descending score."""
    num_thresholds, num_detections = correct.shape
    sampled = np.zeros((num_thresholds, len(RECALL_THRESHOLDS)))
    if num_detections == 0:
        return sampled, np.zeros(num_thresholds)
    tp, fp = correct.cumsum(axis=1, dtype=float), wrong.cumsum(axis=1, dtype=float)
    recall = tp / num_truth
    precision = tp / (fp + tp + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for t in range(num_thresholds):
        first = np.searchsorted(recall[t], RECALL_THRESHOLDS, side="left")
        reached = first < num_detections
        sampled[t, reached] = envelope[t, first[reached]]
    return sampled, recall[:, -1]


def _mean(values: np.ndarray) -> float:
    """Mean over what is defined, in the order that pycocotools adds it; -1 where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
