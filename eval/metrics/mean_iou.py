"""Mean IoU and pixel accuracies of semantic segmentation as a mergeable state.

Pixels without a truth label are dropped before counting. Conventions differ in how they treat a class without truth
pixels. `miou` follows detectron2's SemSegEvaluator, as in the Mask2Former papers; `MeanIoU` documents the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.overlaps import common_runs


def ignore_label(num_classes: int) -> int:
    """Return the value of unlabelled pixels in a truth map: 255 (uint8), or 65535 (uint16) for 256 or more classes."""
    return 255 if num_classes <= 255 else 65535


BINARY_MASK = (
    "only the values 0 and 255, and 255 means no label; pass (mask > 127).astype('uint8'), or set ignore=255 if 255 is "
    "void"
)


def is_binary_mask(values: Collection[int], ignore: int | None, num_classes: int) -> bool:
    """Return whether label maps with these values are masks of 0 and 255, whose foreground would have no label."""
    return ignore is None and ignore_label(num_classes) == 255 and set(values) == {0, 255}


@dataclass(frozen=True, eq=False)
class ConfusionRecord(Record):
    """Non-empty cells of one image's confusion matrix, in ascending order."""

    cell: np.ndarray = field(metadata=column("int32"))
    """truth * num_classes + prediction; num_classes^2 + truth if the prediction is void."""
    pixels: np.ndarray = field(metadata=column("int64"))


@dataclass(frozen=True)
class MeanIoU:
    """Scores as shares, not per cent; None if no pixel has a label."""

    miou: float | None
    """Mean over the classes with truth pixels (detectron2)."""
    miou_occurring: float | None
    """Mean over classes with truth or predicted pixels; a class that is only predicted counts 0 (mmseg, Cityscapes)."""
    miou_all: float | None
    """Mean over all classes; a class that does not occur counts 0."""
    fwiou: float | None
    """Mean IoU weighted by the classes' truth pixels."""
    macc: float | None
    """Mean accuracy over the classes with truth pixels."""
    pacc: float | None
    """Share of labelled pixels with the correct class."""
    per_class: tuple[float | None, ...]
    """IoU of every class; None if neither truth nor prediction has a pixel of it."""
    truth_pixels: tuple[int, ...]
    """Truth pixels of every class."""


class MeanIoUState(MetricState[ConfusionRecord, MeanIoU]):
    """Sparse confusion matrices per image. Truth pixels with the value `ignore` have no label.

    Predicted pixels with the value `void` have no class: each counts as a miss of the truth's class, and as a false
    positive of no class. If `void` is None, predictions must give every pixel a class.
    """

    name = "mean IoU"

    def __init__(self, num_classes: int, ignore: int | None = None, void: int | None = None) -> None:
        self.num_classes = num_classes
        self.ignore = ignore_label(num_classes) if ignore is None else ignore
        self.void = void
        settings = {"num_classes": num_classes, "ignore": self.ignore}
        super().__init__(ConfusionRecord, settings if void is None else {**settings, "void": void})

    def update(self, image_id: int, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count one image: label maps [H, W]. Raises EvaluationError naming the image for wrong sizes or labels."""
        if truth.shape != predicted.shape:
            raise EvaluationError(
                f"image {image_id}: the truth has shape {truth.shape}, but the prediction has {predicted.shape}"
            )
        truth_labels, predicted_labels, lengths = common_runs(truth, predicted)
        labelled = truth_labels != self.ignore
        rows, columns = truth_labels[labelled].astype(np.intp), predicted_labels[labelled].astype(np.intp)
        void = np.zeros(len(columns), dtype=bool) if self.void is None else columns == self.void
        for side, labels in (("truth", rows), ("prediction", columns[~void])):
            if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise EvaluationError(
                    f"image {image_id}: the {side} has labels from {labels.min()} to {labels.max()}, "
                    f"outside 0..{self.num_classes - 1}"
                )
        cells = np.where(void, self.num_classes**2 + rows, rows * self.num_classes + columns)
        pixels = np.bincount(cells, weights=lengths[labelled])
        cells = pixels.nonzero()[0]
        self.add(image_id, ConfusionRecord(cells, pixels[cells]))

    def confusion(self) -> np.ndarray:
        """Return the pixels [K truth, K predicted] int64 of all images, without void."""
        return self._counts()[: self.num_classes**2].reshape(self.num_classes, self.num_classes)

    def void_pixels(self) -> np.ndarray:
        """Return, for every class of the truth, the pixels [K] int64 whose prediction is void."""
        return self._counts()[self.num_classes**2 :]

    def _counts(self) -> np.ndarray:
        """Return the pixels of all cells: [K * (K + 1)] int64, of which the last K have a void prediction."""
        counts = np.zeros(self.num_classes * (self.num_classes + 1), dtype=np.int64)
        np.add.at(counts, self.rows("cell"), self.rows("pixels"))
        return counts

    def compute(self) -> MeanIoU:
        """Compute the scores of all conventions from one confusion matrix."""
        return self.compute_for_classes(None)

    def compute_for_classes(self, chosen: Collection[int] | None) -> MeanIoU:
        """Compute the scores as `compute` does, averaged over `chosen` classes; None: all."""
        return mean_iou_from_counts(self.confusion(), self.void_pixels(), chosen)


def split_cells(cells: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of truth and prediction for cells of records; -1 if the prediction is void."""
    truth, predicted = np.divmod(cells, num_classes)
    void = cells >= num_classes**2
    return np.where(void, cells - num_classes**2, truth), np.where(void, -1, predicted)


def mean_iou_from_counts(
    confusion: np.ndarray, void_pixels: np.ndarray, chosen: Collection[int] | None = None
) -> MeanIoU:
    """Compute all scores from pixels [K truth, K predicted] and pixels [K truth] whose prediction is void.

    With `chosen`, averages are over these classes and count only their truth pixels; None: all classes.
    """
    num_classes = len(confusion)
    counted = np.isin(np.arange(num_classes), range(num_classes) if chosen is None else list(chosen))
    correct = confusion.diagonal().astype(float)
    truth = (confusion.sum(axis=1) + void_pixels).astype(float)
    union = truth + confusion.sum(axis=0) - correct
    labelled, occurring = counted & (truth > 0), counted & (union > 0)
    iou = np.divide(correct, union, out=np.zeros_like(correct), where=occurring)
    if not labelled.any():
        return MeanIoU(None, None, None, None, None, None, (None,) * num_classes, (0,) * num_classes)
    total = truth[counted].sum()
    return MeanIoU(
        miou=float(iou[labelled].sum() / labelled.sum()),
        miou_occurring=float(iou[occurring].sum() / occurring.sum()),
        miou_all=float(iou[counted].sum() / counted.sum()),
        fwiou=float((iou[labelled] * (truth[labelled] / total)).sum()),
        macc=float((correct[labelled] / truth[labelled]).sum() / labelled.sum()),
        pacc=float(correct[counted].sum() / total),
        per_class=tuple(float(v) if occurs else None for v, occurs in zip(iou, occurring, strict=True)),
        truth_pixels=tuple(int(pixels) for pixels in truth),
    )
