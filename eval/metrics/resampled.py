"""PQ, AP and mIoU of image sets that were drawn again from the evaluated images, many draws at once.

A draw is a weight per image: how often it was drawn. Every function takes weights [images, draws] and returns the
metric of every draw; weights of one give the metric of the set itself. All classes are reduced at once, because the
time of a thousand draws limits intervals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.storage.ragged_table import Ragged
from m2f.eval.metrics.average_precision import RECALL_THRESHOLDS
from m2f.eval.metrics.instance_matching import IOU_THRESHOLDS

CHUNK_BYTES = 2**26
"""What the weights of all detections may take at once."""
CLASSES_AT_ONCE = 64
_REVERSED_STEP = 2.0
"""More than any precision: keeps the running maximum of one class out of the next."""


@dataclass(frozen=True, eq=False)
class PanopticImages:
    """Matches and errors by image, as `PanopticRecord` has them."""

    matched_label: Ragged
    matched_iou: Ragged
    false_positive: Ragged
    false_negative: Ragged


@dataclass(frozen=True, eq=False)
class InstanceImages:
    """Detections by image over all areas, as `DetectionRecord` has them; bit t belongs to IoU threshold t."""

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
    """How often every image [images] is in every draw of as many images with replacement: [images, draws] int32.

    The same for the same ids, so that all runs that were evaluated on these images are drawn alike.
    """
    count = len(image_ids)
    key = hashlib.blake2b(np.sort(image_ids.astype(np.int64)).tobytes(), digest_size=16).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    weights = np.empty((draws, count), dtype=np.int32)
    for draw in range(draws):
        weights[draw] = np.bincount(random.integers(count, size=count), minlength=count)
    return np.ascontiguousarray(weights.T)


def panoptic_qualities(images: PanopticImages, weights: np.ndarray) -> np.ndarray:
    """PQ over the classes that occur in a draw [draws], shares; NaN where none does."""
    found, wrong, missed = images.matched_label, images.false_positive, images.false_negative
    parts = [
        (found, images.matched_iou.values),
        *((side, np.ones(len(side.values))) for side in (found, wrong, missed)),
    ]

    def quality(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        iou, *counts = sums
        size = counts[0] + 0.5 * (counts[1] + counts[2])
        return iou, size

    return _mean_over_classes(parts, weights, quality)


def mean_ious(images: SemanticImages, weights: np.ndarray) -> np.ndarray:
    """mIoU over the classes with truth pixels in a draw [draws], shares; NaN where no pixel has a label."""
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
    """Mean of numerator / denominator over the classes whose denominator is above 0, by draw.

    `parts`: class of every row, and what it adds to the sum of its class; `reduce` turns the sums
    [parts, classes, draws] into numerators and denominators.
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
    """[images, width] sums of the values by image and class, of the classes from `first` on."""
    chosen = (labels.values >= first) & (labels.values < first + width)
    cells = labels.rows[chosen] * width + (labels.values[chosen] - first)
    shape = len(labels.counts), width
    return np.bincount(cells, weights=values[chosen], minlength=shape[0] * width).reshape(shape)


def average_precisions(images: InstanceImages, weights: np.ndarray) -> np.ndarray:
    """AP over the classes with annotations in a draw [draws], shares; NaN where nothing is annotated."""
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
    found = []
    for first in range(0, weights.shape[1], chunk):
        part = np.ascontiguousarray(weights[:, first : first + chunk])
        truth_count = annotated @ part
        by_group = _group_precisions(detections, part, truth_count)
        occurs = truth_count > 0
        defined = occurs.sum(axis=0)
        total = np.where(occurs, by_group, 0).sum(axis=0)
        found.append(np.divide(total, defined, out=np.full(len(total), np.nan), where=defined > 0))
    return np.concatenate(found) if found else np.zeros(0)


def image_precisions(images: InstanceImages) -> np.ndarray:
    """AP of every image by itself [images], over the classes annotated in it; NaN where nothing is annotated."""
    count = len(images.label.counts)
    num_classes = int(max(images.label.values.max(initial=0), images.truth_label.values.max(initial=0))) + 1
    counted = images.truth_count.values > 0
    pairs = (images.truth_label.rows * num_classes + images.truth_label.values)[counted]
    key = images.label.rows * num_classes + images.label.values
    judged = np.flatnonzero(np.isin(key, pairs))  # a class without an annotation in the image has no AP there
    order = judged[np.lexsort((-images.score.values[judged], key[judged]))]
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
    """Sorted by group, best first inside."""

    group: np.ndarray
    """[D] int64"""
    image: np.ndarray
    """[D] int64"""
    matched: np.ndarray
    """[D] uint16, a bit per IoU threshold."""
    ignored: np.ndarray
    """[D] uint16, a bit per IoU threshold."""


def _group_precisions(detections: _Detections, weights: np.ndarray, truth_count: np.ndarray) -> np.ndarray:
    """Interpolated AP [groups, draws], mean over IoU thresholds, from weights [images, draws]."""
    weighted = weights[detections.image]
    running = _running(weighted)
    starts = np.searchsorted(detections.group, np.arange(len(truth_count)))
    precision = np.zeros(truth_count.shape)
    for threshold in range(len(IOU_THRESHOLDS)):
        matched, ignored = ((bits >> threshold & 1) > 0 for bits in (detections.matched, detections.ignored))
        hits = np.flatnonzero(matched & ~ignored)
        if not len(hits):
            continue
        group = detections.group[hits]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        of_hit = np.cumsum(np.diff(group, prepend=-1) > 0) - 1  # position in `first`
        correct = _running(weighted[hits])
        correct = correct[1:] - correct[first][of_hit]
        left_out = np.flatnonzero(ignored)
        skipped = _running(weighted[left_out])
        seen = running[hits + 1] - running[starts[group]]
        seen -= skipped[np.searchsorted(left_out, hits)] - skipped[np.searchsorted(left_out, starts[group])]
        curve = correct / (seen + np.spacing(1))
        recall = correct / np.maximum(truth_count[group], 1)
        areas = _envelope(curve, of_hit) * _newly_reached(recall, first)
        precision[group[first]] += np.add.reduceat(areas, first, axis=0)
    return precision / (len(IOU_THRESHOLDS) * len(RECALL_THRESHOLDS))


def _running(weighted: np.ndarray) -> np.ndarray:
    """[N + 1, draws] sums of the rows before each position."""
    sums = np.zeros((len(weighted) + 1, weighted.shape[1]), dtype=np.int32)
    np.cumsum(weighted, axis=0, out=sums[1:])
    return sums


def _envelope(precision: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The best precision at or after each row [N, draws] inside its group [N]. Rows between hits never have it."""
    offset = _REVERSED_STEP * (group[-1] - group)[:, None]
    raised = precision + offset
    return np.maximum.accumulate(raised[::-1], axis=0)[::-1] - offset


def _newly_reached(recall: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How many recall thresholds each row reaches that no row before it in its group does; `first`: rows of groups."""
    last = len(RECALL_THRESHOLDS) - 1
    reached = np.minimum((recall * last).astype(np.int32), last)
    reached += RECALL_THRESHOLDS[np.minimum(reached + 1, last)] <= recall  # rounding: the thresholds decide
    reached -= RECALL_THRESHOLDS[np.minimum(reached, last)] > recall
    np.minimum(reached, last, out=reached)
    new = np.diff(reached, axis=0, prepend=-1)
    new[first] = reached[first] + 1
    return new
