"""Match detected to annotated instances, as COCO defines it (pycocotools' COCOeval).

The shortcuts are exact. Only pairs that can reach the lowest threshold are compared. All images of a call, all
thresholds and all area ranges are matched together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from m2f.eval.metrics.base import Record, column
from m2f.eval.metrics.boundary import mask_boundaries
from m2f.eval.metrics.engine import pairwise_ious
from m2f.eval.metrics.rle import Rle, chosen_masks, mask_areas

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds of pycocotools, computed in the same way."""
AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Ranges of areas in pixels. Both bounds are included, so an area of 1024 is both small and medium."""
NUM_AREAS = len(AREA_RANGES)
AREA_BOUNDS = (32.0**2, 96.0**2)
"""Smallest area of a medium and of a large instance in COCO, in pixels."""
_ALL_THRESHOLDS = np.uint16((1 << len(IOU_THRESHOLDS)) - 1)
"""The bits of all IoU thresholds. Bit t belongs to IOU_THRESHOLDS[t]."""
_RANGE_BITS = 1 << np.arange(NUM_AREAS, dtype=np.int64) * len(IOU_THRESHOLDS)
"""Lowest bit of every area range in a set of (area range, threshold)."""
_FIRST_THRESHOLDS = _RANGE_BITS.sum() * ((1 << np.arange(len(IOU_THRESHOLDS) + 1, dtype=np.int64)) - 1)
"""Element n has the bits of the n lowest thresholds in every area range."""


@dataclass(frozen=True)
class InstanceTruth:
    """Annotated instances of one image, in the order of the annotation."""

    masks: tuple[Rle, ...]
    labels: np.ndarray
    """[G] int64 contiguous class indices."""
    areas: np.ndarray
    """[G] float64 areas stated by the annotation, in pixels."""
    is_crowd: np.ndarray
    """[G] bool: whether the instance is a crowd."""
    pixels: np.ndarray | None = None
    """[G] pixels of every mask; None: not counted yet."""


@dataclass(frozen=True)
class InstanceDetections:
    """Detections of one image. Those with equal scores are ranked in this order. Several may share a mask."""

    masks: Sequence[Rle]
    """The distinct masks."""
    mask_index: np.ndarray
    """[D] int64 indices into `masks`."""
    labels: np.ndarray
    """[D] int64 contiguous class indices."""
    scores: np.ndarray
    """[D] float64 scores."""
    areas: np.ndarray | None = None
    """[masks] pixels of every mask; None: not counted yet."""


@dataclass(frozen=True, eq=False)
class DetectionRecord(Record):
    """Detections of one image, class by class and best first.

    Bit t of `matched` and `ignored` belongs to IOU_THRESHOLDS[t].
    """

    label: np.ndarray = field(metadata=column("int32"))
    score: np.ndarray = field(metadata=column("float64"))
    matched: np.ndarray = field(metadata=column("uint16", NUM_AREAS))
    """Flags of detections matched to an annotation, per area range."""
    ignored: np.ndarray = field(metadata=column("uint16", NUM_AREAS))
    """Flags of detections that are ignored, as neither true nor false positives, per area range."""
    truth_label: np.ndarray = field(metadata=column("int32"))
    """Classes with annotations, in ascending order."""
    truth_count: np.ndarray = field(metadata=column("int32", NUM_AREAS))
    """Number of annotations of each of these classes that are not ignored, per area range."""


def area_ranges(bounds: Sequence[float] = AREA_BOUNDS) -> np.ndarray:
    """Return area ranges [NUM_AREAS, 2] in pixels, bounds included: all, small, medium, large.

    `bounds` holds the smallest areas of medium and of large instances.
    """
    medium, large = bounds
    max_area = AREA_RANGES["all"][1]
    return np.array([(0.0, max_area), (0.0, medium), (medium, large), (large, max_area)])


def match_instances(
    truth: InstanceTruth,
    detections: InstanceDetections,
    limit: int,
    boundary_ratio: float | None = None,
    ranges: np.ndarray | None = None,
) -> DetectionRecord:
    """Match one image as `match_images` does."""
    return match_images([(truth, detections)], limit, boundary_ratio, ranges)[0]


def match_images(
    images: Sequence[tuple[InstanceTruth, InstanceDetections]],
    limit: int,
    boundary_ratio: float | None = None,
    ranges: np.ndarray | None = None,
) -> list[DetectionRecord]:
    """Match the detections of every image greedily by mask IoU, at most `limit` per class; see `_records`.

    With `boundary_ratio` the IoU of a pair is the smaller of its mask IoU and its boundary IoU, except for crowds.
    """
    truth = _concatenate_truth([(t.labels, t.areas, t.is_crowd) for t, _ in images])
    areas = [mask_areas(d.masks) if d.areas is None else d.areas for _, d in images]
    columns = [(d.labels, d.scores) for _, d in images]
    detection_areas = [areas_by_mask[d.mask_index] for areas_by_mask, (_, d) in zip(areas, images, strict=True)]
    detections = _concatenate_detections(columns, np.concatenate(detection_areas), limit)
    masks = _BatchMasks(
        detected=[d.masks for _, d in images],
        index=np.concatenate([d.mask_index for _, d in images])[detections.source],
        annotated=[mask for t, _ in images for mask in t.masks],
        is_crowd=truth.is_crowd.tolist(),
    )
    pixels = [mask_areas(t.masks) if t.pixels is None else t.pixels for t, _ in images]
    pairs = _candidate_pairs(detections, truth, np.concatenate(pixels))
    ious = _pair_ious(pairs, detections, masks)
    if boundary_ratio is not None:
        is_close = (ious >= IOU_THRESHOLDS[0]) & ~truth.is_crowd[pairs.truth]
        close_pairs = _Pairs(pairs.detection[is_close], pairs.truth[is_close])
        ious[is_close] = np.minimum(
            ious[is_close],
            _pair_ious(close_pairs, detections, _with_boundaries(masks, close_pairs, detections, boundary_ratio)),
        )
    return _records(detections, truth, pairs, ious, ranges)


@dataclass(frozen=True)
class ScoredDetections:
    """Detections of one image with the data for matching. Those with equal scores are ranked in this order."""

    labels: np.ndarray
    """[D] int64 contiguous class indices."""
    scores: np.ndarray
    """[D] float64 scores."""
    areas: np.ndarray
    """[D] float64 areas in pixels."""
    ious: np.ndarray
    """[D, G] float64 IoU; for crowds the intersection divided by the detection's area."""


def match_by_iou(
    truth_label: np.ndarray,
    truth_area: np.ndarray,
    is_crowd: np.ndarray,
    detections: ScoredDetections,
    limit: int,
    ranges: np.ndarray | None = None,
) -> DetectionRecord:
    """Match one image greedily by known IoUs, otherwise as `match_images` does. Annotations are [G]."""
    truth = _concatenate_truth([(truth_label, truth_area, is_crowd)])
    sorted_detections = _concatenate_detections([(detections.labels, detections.scores)], detections.areas, limit)
    ious = detections.ious[sorted_detections.source]
    pairs = _Pairs(*(sorted_detections.label[:, None] == truth.label).nonzero())
    return _records(sorted_detections, truth, pairs, ious[pairs], ranges)[0]


class _BatchTruth(NamedTuple):
    """Annotations [G] of several images, image by image."""

    image: np.ndarray
    label: np.ndarray
    area: np.ndarray
    is_crowd: np.ndarray


class _BatchDetections(NamedTuple):
    """Detections [D] of several images, image by image, class by class and best first."""

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    area: np.ndarray
    source: np.ndarray
    """Positions before sorting."""
    num_images: int


class _Pairs(NamedTuple):
    """Pairs [P] of a detection and an annotation of the same class and image."""

    detection: np.ndarray
    truth: np.ndarray


def _concatenate_truth(images: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _BatchTruth:
    """Join labels, areas and crowd flags of all images."""
    image = np.repeat(np.arange(len(images)), [len(labels) for labels, _, _ in images])
    label, area, is_crowd = (np.concatenate(side) for side in zip(*images, strict=True))
    return _BatchTruth(image, label.astype(np.int64), area, is_crowd.astype(bool))


def _concatenate_detections(
    images: Sequence[tuple[np.ndarray, np.ndarray]], areas: np.ndarray, limit: int
) -> _BatchDetections:
    """Join the labels and scores of all images, and keep at most `limit` detections per image and class.

    `areas` are those of all images, already joined.
    """
    image = np.repeat(np.arange(len(images)), [len(labels) for labels, _ in images])
    label, score = (np.concatenate(side) for side in zip(*images, strict=True))
    label = label.astype(np.int64)
    order = np.lexsort((-score, label, image))
    sorted_label = label[order]
    counts = np.bincount(image, minlength=len(images))
    order = order[rank_in_image_and_class(sorted_label, counts) < limit]
    return _BatchDetections(image[order], label[order], score[order], areas[order], order, len(images))


def _candidate_pairs(detections: _BatchDetections, truth: _BatchTruth, truth_pixels: np.ndarray) -> _Pairs:
    """Return pairs of one image and class that can match.

    These are pairs whose ratio of areas reaches the lowest IoU threshold, and all pairs with a crowd.
    """
    num_classes = 1 + max(int(truth.label.max(initial=0)), int(detections.label.max(initial=0)))
    truth_keys, detection_keys = (
        truth.image * num_classes + truth.label,
        detections.image * num_classes + detections.label,
    )
    order = truth_keys.argsort(kind="stable")
    truth_keys = truth_keys[order]
    first = np.searchsorted(truth_keys, detection_keys, side="left")
    counts = np.searchsorted(truth_keys, detection_keys, side="right") - first
    detection = np.repeat(np.arange(len(detection_keys)), counts)
    position_in_group = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts)
    partner = order[np.repeat(first, counts) + position_in_group]
    pixels, partner_pixels = detections.area[detection], truth_pixels[partner]
    can_match = np.minimum(pixels, partner_pixels) >= IOU_THRESHOLDS[0] * np.maximum(pixels, partner_pixels)
    can_match |= truth.is_crowd[partner]
    return _Pairs(detection[can_match], partner[can_match])


class _BatchMasks(NamedTuple):
    """Masks of several images."""

    detected: Sequence[Sequence[Rle]]
    """Detected masks of every image."""
    index: np.ndarray
    """[D] index of every detection into the masks of its image."""
    annotated: Sequence[Rle]
    """Annotated masks of all images."""
    is_crowd: Sequence[bool]
    """Crowd flags of the annotated masks of all images."""


def _pair_ious(pairs: _Pairs, detections: _BatchDetections, masks: _BatchMasks) -> np.ndarray:
    """Return the mask IoU [P] of every pair. Each mask is compared once, even if several pairs share it."""
    image, label = detections.image[pairs.detection], detections.label[pairs.detection]
    starts = np.flatnonzero(np.diff(image, prepend=-1) | np.diff(label, prepend=-1))
    index, truths = masks.index[pairs.detection].tolist(), pairs.truth.tolist()
    ious: list[float] = []
    for (start, end), image_number in zip(_run_bounds(starts, len(truths)), image[starts].tolist(), strict=True):
        detected = masks.detected[image_number]
        rows = {mask: row for row, mask in enumerate(dict.fromkeys(index[start:end]))}
        columns = {truth: column for column, truth in enumerate(dict.fromkeys(truths[start:end]))}
        table = pairwise_ious(
            chosen_masks(detected, rows), [masks.annotated[i] for i in columns], [masks.is_crowd[i] for i in columns]
        ).tolist()
        if len(columns) == 1 and len(rows) == end - start:
            ious += [value for (value,) in table]
        elif len(rows) == end - start:  # each detection is in one pair
            ious += [row[columns[g]] for row, g in zip(table, truths[start:end], strict=True)]
        else:
            ious += [table[rows[m]][columns[g]] for m, g in zip(index[start:end], truths[start:end], strict=True)]
    return np.array(ious)


def _with_boundaries(masks: _BatchMasks, pairs: _Pairs, detections: _BatchDetections, ratio: float) -> _BatchMasks:
    """Return the masks, with those that occur in `pairs` reduced to their boundaries."""
    images, index = detections.image[pairs.detection], masks.index[pairs.detection]
    detected = [
        _replace_by_boundaries(image_masks, index[images == image], ratio)
        for image, image_masks in enumerate(masks.detected)
    ]
    return masks._replace(detected=detected, annotated=_replace_by_boundaries(masks.annotated, pairs.truth, ratio))


def _replace_by_boundaries(masks: Sequence[Rle], chosen: np.ndarray, ratio: float) -> list[Rle]:
    """Return the masks, with the chosen ones reduced to their boundaries."""
    positions = np.unique(chosen).tolist()
    outlined = list(masks)
    for position, boundary in zip(positions, mask_boundaries([masks[i] for i in positions], ratio), strict=True):
        outlined[position] = boundary
    return outlined


def class_agnostic_truth(truth: InstanceTruth) -> InstanceTruth:
    """Return all instances as one class, sorted by their former class, as pycocotools does with `useCats=0`."""
    order = truth.labels.argsort(kind="stable")
    masks = tuple(truth.masks[i] for i in order)
    pixels = None if truth.pixels is None else truth.pixels[order]
    return InstanceTruth(masks, np.zeros_like(truth.labels), truth.areas[order], truth.is_crowd[order], pixels)


def class_agnostic_detections(detections: InstanceDetections) -> InstanceDetections:
    """Return all detections as one class. Among equal scores the lower class is first, as with `useCats=0`."""
    order = detections.labels.argsort(kind="stable")
    labels = np.zeros_like(detections.labels)
    scores = detections.scores[order]
    return InstanceDetections(detections.masks, detections.mask_index[order], labels, scores, detections.areas)


def _records(
    detections: _BatchDetections, truth: _BatchTruth, pairs: _Pairs, ious: np.ndarray, ranges: np.ndarray | None
) -> list[DetectionRecord]:
    """Match every image greedily, best score first.

    A detection takes the free annotation with the highest IoU, and the last one among equal IoUs. An ignored annotation
    is taken only if no other annotation matches. A crowd can be taken any number of times. `ranges` has the form of
    `area_ranges`.
    """
    bounds = area_ranges() if ranges is None else ranges
    truth_ignored = truth.is_crowd | _is_outside(truth.area, bounds)
    matched, ignored = _match(len(detections.label), pairs, ious, truth.is_crowd, truth_ignored)
    ignored |= np.where(_is_outside(detections.area, bounds).T, ~matched & _ALL_THRESHOLDS, np.uint16(0))

    order = np.lexsort((truth.label, truth.image))
    image, label = truth.image[order], truth.label[order]
    first = np.flatnonzero(np.diff(image, prepend=-1) | np.diff(label, prepend=-1))
    counts = (~truth_ignored[:, order]).T.astype(np.int32)
    counted = np.add.reduceat(counts, first) if len(first) else np.zeros((0, NUM_AREAS), dtype=np.int32)
    images = np.arange(1, detections.num_images)
    detection_starts, class_starts = np.searchsorted(detections.image, images), np.searchsorted(image[first], images)
    per_detection = (
        np.split(side, detection_starts) for side in (detections.label, detections.score, matched, ignored)
    )
    per_class = (np.split(side, class_starts) for side in (label[first], counted))
    return [DetectionRecord(*columns) for columns in zip(*per_detection, *per_class, strict=True)]


def _match(
    num_detections: int, pairs: _Pairs, ious: np.ndarray, is_crowd: np.ndarray, truth_ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return matched and ignored bits [D, A] uint16 from IoU [P], crowd flags [G] and ignored flags [A, G].

    A set of (area range, threshold) is stored as the bits of one integer, 10 per range. So matching takes a few
    operations per pair.
    """
    bits = len(IOU_THRESHOLDS)
    overlaps = ious >= IOU_THRESHOLDS[0]
    d, g, iou = pairs.detection[overlaps], pairs.truth[overlaps], ious[overlaps]
    order = np.lexsort((-g, -iou, d))  # per detection, the highest IoU first, and the last one among equals
    d, g, iou = d[order], g[order], iou[order]
    reached_bits = _FIRST_THRESHOLDS[np.searchsorted(IOU_THRESHOLDS, iou, side="right")].tolist()
    counts = (_RANGE_BITS @ ~truth_ignored * ((1 << bits) - 1)).tolist()
    all_bits = (1 << bits * NUM_AREAS) - 1
    free_bits, crowds = [all_bits] * len(is_crowd), is_crowd.tolist()
    first = np.flatnonzero(np.diff(d, prepend=-1))
    detections, truths = d[first].tolist(), g.tolist()
    matched, ignored = [0] * num_detections, [0] * num_detections
    for detection, (start, end) in zip(detections, _run_bounds(first, len(d)), strict=True):
        open_bits = all_bits
        for position in range(start, end):  # annotations that are not ignored come first
            truth = truths[position]
            taken_bits = open_bits & reached_bits[position] & counts[truth] & free_bits[truth]
            free_bits[truth] ^= taken_bits
            open_bits ^= taken_bits
        counted_bits = open_bits
        for position in range(start, end):
            truth = truths[position]
            taken_bits = open_bits & reached_bits[position] & ~counts[truth] & free_bits[truth]
            open_bits ^= taken_bits
            if not crowds[truth]:  # a crowd stays free
                free_bits[truth] ^= taken_bits
        ignored[detection] = counted_bits ^ open_bits
        matched[detection] = all_bits ^ open_bits
    return _by_range(matched), _by_range(ignored)


def _run_bounds(starts: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Return (start, end) of the runs of a sequence of `length`. `starts` holds the start of every run, 0 first."""
    bounds = [*starts.tolist(), length]
    return list(itertools.pairwise(bounds))


def _by_range(sets: list[int]) -> np.ndarray:
    """Convert sets of (area range, threshold) to bits of thresholds: [D, A] uint16."""
    shifts = np.arange(NUM_AREAS) * len(IOU_THRESHOLDS)
    return (np.array(sets, dtype=np.int64)[:, None] >> shifts & int(_ALL_THRESHOLDS)).astype(np.uint16)


def _is_outside(areas: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return whether each area is outside each range: [A, N]."""
    return (areas < bounds[:, :1]) | (areas > bounds[:, 1:])


def rank_in_image_and_class(label: np.ndarray, per_image: np.ndarray) -> np.ndarray:
    """Return the position of each row within its image and class.

    Rows of an image are sorted by class. `per_image` is the number of rows of every image.
    """
    if not len(label):
        return np.zeros(0, dtype=np.int64)
    image = np.repeat(np.arange(len(per_image)), per_image)
    new = np.concatenate([[True], (label[1:] != label[:-1]) | (image[1:] != image[:-1])])
    rows = np.arange(len(label))
    return rows - np.maximum.accumulate(np.where(new, rows, 0))
