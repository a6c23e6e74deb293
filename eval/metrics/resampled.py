"""PQ, AP and mIoU of bootstrap samples of the evaluated images, for many draws at once.

A draw gives every image a weight: how often it was drawn. Every function takes weights [images, draws] and returns the
metric of every draw; weights of 1 give the metric of the original set. Many classes are reduced at once, because a
thousand draws would otherwise take too long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.storage.ragged_table import Ragged
from m2f.eval.metrics.average_precision import RECALL_THRESHOLDS
from m2f.eval.metrics.instance_matching import IOU_THRESHOLDS

CHUNK_BYTES = 2**26
"""Largest memory for the weights of all detections, in bytes. More draws are processed in several chunks."""
CLASSES_AT_ONCE = 64
"""Number of classes whose sums by draw are in memory at once. It bounds the memory, not the result."""
_ALL_THRESHOLDS = range(len(IOU_THRESHOLDS))
_REVERSED_STEP = 2.0
"""Larger than any precision, so that the running maximum of one class does not reach the next."""


@dataclass(frozen=True, eq=False)
class PanopticImages:
    """Matches and errors by image, with the columns of `PanopticRecord`."""

    matched_label: Ragged
    matched_iou: Ragged
    false_positive: Ragged
    false_negative: Ragged


@dataclass(frozen=True, eq=False)
class InstanceImages:
    """Detections by image over all areas, as in `DetectionRecord`; bit t belongs to IoU threshold t."""

    label: Ragged
    score: Ragged
    matched: Ragged
    ignored: Ragged
    truth_label: Ragged
    truth_count: Ragged


@dataclass(frozen=True, eq=False)
class SemanticImages:
    """Pixels by image and pair of classes."""

    truth: Ragged
    predicted: Ragged
    pixels: Ragged


def draw_weights(image_ids: np.ndarray, draws: int) -> np.ndarray:
    """Return how often every image [images] occurs in every draw with replacement: [images, draws] int32.

    Each draw has as many images as the set. The same ids give the same draws, so that all runs evaluated on these
    images are resampled in the same way.
    """
    count = len(image_ids)
    key = hashlib.blake2b(np.sort(image_ids.astype(np.int64)).tobytes(), digest_size=16).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    weights = np.empty((draws, count), dtype=np.int32)
    for draw in range(draws):
        weights[draw] = np.bincount(random.integers(count, size=count), minlength=count)
    return np.ascontiguousarray(weights.T)


def panoptic_qualities(images: PanopticImages, weights: np.ndarray) -> np.ndarray:
    """Return the PQ over the classes that occur in a draw: [draws], as shares; NaN if none occurs."""
    matched, wrong, missed = images.matched_label, images.false_positive, images.false_negative
    parts = [
        (matched, images.matched_iou.values),
        *((side, np.ones(len(side.values))) for side in (matched, wrong, missed)),
    ]

    def quality(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        iou, *counts = sums
        size = counts[0] + 0.5 * (counts[1] + counts[2])
        return iou, size

    return _mean_over_classes(parts, weights, quality)


def mean_ious(images: SemanticImages, weights: np.ndarray) -> np.ndarray:
    """Return the mIoU over the classes with truth pixels in a draw: [draws], as shares; NaN if no pixel has a label."""
    same = images.truth.values == images.predicted.values
    pixels = images.pixels.values.astype(np.float64)
    parts = [(images.truth, pixels * same), (images.truth, pixels), (images.predicted, pixels)]

    def iou(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        correct, truth, predicted = sums
        return correct, np.where(truth > 0, truth + predicted - correct, 0)

    return _mean_over_classes(parts, weights, iou)


def _mean_over_classes(
    parts: list[tuple[Ragged, np.ndarray]],
    weights: np.ndarray,
    reduce: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Return, by draw, the mean of numerator / denominator over the classes whose denominator is above 0.

    `parts` holds the class of every row and the value that the row adds to its class. `reduce` converts the sums
    [parts, classes, draws] to numerators and denominators.
    """
    num_classes = max((int(labels.values.max(initial=-1)) + 1 for labels, _ in parts), default=0)
    total, counted = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    by_draw = weights.T.astype(np.float64)
    for first in range(0, num_classes, CLASSES_AT_ONCE):
        width = min(CLASSES_AT_ONCE, num_classes - first)
        sums = np.stack([(by_draw @ _by_image(labels, values, first, width)).T for labels, values in parts])
        numerator, denominator = reduce(sums)
        occurs = denominator > 0
        total += np.divide(numerator, denominator, out=np.zeros_like(numerator), where=occurs).sum(axis=0)
        counted += occurs.sum(axis=0)
    return np.divide(total, counted, out=np.full_like(total, np.nan), where=counted > 0)


def _by_image(labels: Ragged, values: np.ndarray, first: int, width: int) -> np.ndarray:
    """Sum the values by image and class: [images, width], for `width` classes starting at `first`."""
    chosen = (labels.values >= first) & (labels.values < first + width)
    cells = labels.rows[chosen] * width + (labels.values[chosen] - first)
    shape = len(labels.counts), width
    return np.bincount(cells, weights=values[chosen], minlength=shape[0] * width).reshape(shape)


def average_precisions(
    images: InstanceImages, weights: np.ndarray, thresholds: Sequence[int] = _ALL_THRESHOLDS
) -> np.ndarray:
    """Return the AP over the classes with annotations in a draw: [draws], as shares; NaN if there are none.

    `thresholds` are the positions in IOU_THRESHOLDS over which AP is averaged.
    """
    label = images.label.values
    order = np.lexsort((-images.score.values, label))
    detections = _Detections(
        group=label[order].astype(np.int64),
        image=images.label.rows[order],
        matched=images.matched.values[order],
        ignored=images.ignored.values[order],
    )
    truth = images.truth_label.values.astype(np.int64)
    groups = max(int(side.max(initial=-1)) + 1 for side in (truth, detections.group))
    annotated = np.zeros((groups, len(images.label.counts)))
    np.add.at(annotated, (truth, images.truth_label.rows), images.truth_count.values)
    chunk = max(1, CHUNK_BYTES // (4 * max(1, len(label))))
    chunks = []
    for first in range(0, weights.shape[1], chunk):
        part = np.ascontiguousarray(weights[:, first : first + chunk])
        truth_count = annotated @ part
        by_group = _group_precisions(detections, part, truth_count, thresholds)
        occurs = truth_count > 0
        defined = occurs.sum(axis=0)
        total = np.where(occurs, by_group, 0).sum(axis=0)
        chunks.append(np.divide(total, defined, out=np.full(len(total), np.nan), where=defined > 0))
    return np.concatenate(chunks) if chunks else np.zeros(0)


def image_precisions(images: InstanceImages) -> np.ndarray:
    """Return the AP of every single image [images], over the classes annotated in it; NaN if there are none."""
    count = len(images.label.counts)
    num_classes = int(max(images.label.values.max(initial=0), images.truth_label.values.max(initial=0))) + 1
    counted = images.truth_count.values > 0
    pairs = (images.truth_label.rows * num_classes + images.truth_label.values)[counted]
    key = images.label.rows * num_classes + images.label.values
    evaluated = np.flatnonzero(np.isin(key, pairs))  # a class without annotations in the image has no AP there
    order = evaluated[np.lexsort((-images.score.values[evaluated], key[evaluated]))]
    present, group = np.unique(np.concatenate([pairs, key[order]]), return_inverse=True)
    truth_count = np.zeros((len(present), 1))
    truth_count[group[: len(pairs)], 0] = images.truth_count.values[counted]
    detections = _Detections(
        group=group[len(pairs) :],
        image=images.label.rows[order],
        matched=images.matched.values[order],
        ignored=images.ignored.values[order],
    )
    by_group = _group_precisions(detections, np.ones((count, 1), dtype=np.int32), truth_count)[:, 0]
    image = present // num_classes
    sums, classes = np.bincount(image, weights=by_group, minlength=count), np.bincount(image, minlength=count)
    return np.divide(sums, classes, out=np.full(count, np.nan), where=classes > 0)


@dataclass(frozen=True, eq=False)
class _Detections:
    """Detections sorted by group, best first within a group."""

    group: np.ndarray
    """[D] int64: group of each detection."""
    image: np.ndarray
    """[D] int64: position of its image."""
    matched: np.ndarray
    """[D] uint16, one bit per IoU threshold."""
    ignored: np.ndarray
    """[D] uint16, one bit per IoU threshold."""


def _group_precisions(
    detections: _Detections, weights: np.ndarray, truth_count: np.ndarray, thresholds: Sequence[int] = _ALL_THRESHOLDS
) -> np.ndarray:
    """Return the interpolated AP [groups, draws], averaged over the IoU thresholds at these positions.

    `weights` are [images, draws], and `truth_count` holds the weighted annotations [groups, draws].
    """
    weighted = weights[detections.image]
    running = _exclusive_cumsum(weighted)
    starts = np.searchsorted(detections.group, np.arange(len(truth_count)))
    precision = np.zeros(truth_count.shape)
    for threshold in thresholds:
        matched, ignored = ((bits >> threshold & 1) > 0 for bits in (detections.matched, detections.ignored))
        hits = np.flatnonzero(matched & ~ignored)
        if not len(hits):
            continue
        group = detections.group[hits]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        hit_group = np.cumsum(np.diff(group, prepend=-1) > 0) - 1  # position in `first`
        correct = _exclusive_cumsum(weighted[hits])
        correct = correct[1:] - correct[first][hit_group]
        ignored_rows = np.flatnonzero(ignored)
        ignored_weight = _exclusive_cumsum(weighted[ignored_rows])
        counted_weight = running[hits + 1] - running[starts[group]]
        counted_weight -= (
            ignored_weight[np.searchsorted(ignored_rows, hits)]
            - ignored_weight[np.searchsorted(ignored_rows, starts[group])]
        )
        curve = correct / (counted_weight + np.spacing(1))
        recall = correct / np.maximum(truth_count[group], 1)
        areas = _envelope(curve, hit_group) * _newly_reached(recall, first)
        precision[group[first]] += np.add.reduceat(areas, first, axis=0)
    return precision / (len(thresholds) * len(RECALL_THRESHOLDS))


def _exclusive_cumsum(weighted: np.ndarray) -> np.ndarray:
    """Return, for each position, the sum of all rows before it: [N + 1, draws]."""
    sums = np.zeros((len(weighted) + 1, weighted.shape[1]), dtype=np.int32)
    np.cumsum(weighted, axis=0, out=sums[1:])
    return sums


def _envelope(precision: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return, for each row [N, draws] of correct detections, the best precision at or after it in its group [N].

    No other rows are needed, because precision has its maxima at correct detections.
    """
    offset = _REVERSED_STEP * (group[-1] - group)[:, None]
    raised = precision + offset
    return np.maximum.accumulate(raised[::-1], axis=0)[::-1] - offset


def _newly_reached(recall: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Count the recall thresholds that each row reaches first in its group; `first` holds the first rows of groups."""
    last = len(RECALL_THRESHOLDS) - 1
    reached = np.minimum((recall * last).astype(np.int32), last)
    reached += RECALL_THRESHOLDS[np.minimum(reached + 1, last)] <= recall  # correct rounding errors by comparison
    reached -= RECALL_THRESHOLDS[np.minimum(reached, last)] > recall
    np.minimum(reached, last, out=reached)
    new = np.diff(reached, axis=0, prepend=-1)
    new[first] = reached[first] + 1
    return new
