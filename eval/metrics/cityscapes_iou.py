"""IoU and iIoU as Cityscapes defines them (cityscapesScripts, evalPixelLevelSemanticLabeling.py), as a mergeable state.

iIoU weights the pixels of every annotated instance by the average size of its class divided by the instance's size. So
small instances count as much as large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from m2f.data_pipeline.readers.cityscapes import CATEGORIES
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.overlaps import common_runs, compact_ids

NUM_LABELS = 34
"""Number of label ids, which are 0 to 33."""
AVERAGE_PIXELS = {
    24: 3462.4756337644,
    25: 3930.4788056518,
    26: 12794.0202738185,
    27: 27855.1264367816,
    28: 35732.1511111111,
    31: 67583.7075812274,
    32: 6298.7200839748,
    33: 4672.3249222261,
}
"""Average number of pixels of an instance in the training set, by label id."""
GROUPS: dict[str, tuple[int, ...]] = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 31, 32, 33),
}
"""Evaluated label ids of each category of the benchmark."""
INSTANCE_GROUPS: dict[str, tuple[int, ...]] = {"human": (24, 25), "vehicle": (26, 27, 28, 29, 30, 31, 32, 33)}
"""Categories with an iIoU. Any of these labels is correct there, including caravan and trailer, which have no IoU."""
_EVALUATED = tuple(c.id for c in CATEGORIES.categories)
"""Labels with an IoU of their own."""


@dataclass(frozen=True, eq=False)
class CityscapesPixels(Record):
    """Non-empty cells of one image's confusion matrix, and the annotated instances of labels with an iIoU."""

    cell: np.ndarray = field(metadata=column("int32"))
    """truth * NUM_LABELS + prediction, in ascending order."""
    pixels: np.ndarray = field(metadata=column("int64"))
    instance_label: np.ndarray = field(metadata=column("int32"))
    instance_pixels: np.ndarray = field(metadata=column("int64"))
    right_label: np.ndarray = field(metadata=column("int64"))
    """Pixels of the instance that are predicted with its label."""
    right_group: np.ndarray = field(metadata=column("int64"))
    """Pixels of the instance that are predicted with any label of its category."""


@dataclass(frozen=True)
class CityscapesIoU:
    """IoU and iIoU as shares, not per cent. None if neither truth nor prediction has a pixel; averages omit None."""

    iou: float | None
    iiou: float | None
    group_iou: float | None
    group_iiou: float | None
    per_class: dict[int, float | None]
    """IoU by label id."""
    per_class_iiou: dict[int, float | None]
    """iIoU by label id of the things."""
    per_group: dict[str, float | None]
    per_group_iiou: dict[str, float | None]


class CityscapesIoUState(MetricState[CityscapesPixels, CityscapesIoU]):
    """Confusion cells and instances per image."""

    name = "Cityscapes IoU"

    def __init__(self) -> None:
        super().__init__(CityscapesPixels, {})

    def update(self, image_id: int, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count one image: `truth` [H, W] has ids as in gtFine_instanceIds.png, `predicted` [H, W] has label ids.

        Raises EvaluationError naming the image if sizes differ or a label does not exist.
        """
        try:
            self.add(image_id, count_cityscapes(truth, predicted))
        except ValueError as error:
            raise EvaluationError(f"image {image_id}: {error}") from error

    def compute(self) -> CityscapesIoU:
        """Compute IoU and iIoU of all classes and categories, and their means."""
        confusion = np.zeros(NUM_LABELS**2, dtype=np.int64)
        np.add.at(confusion, self.rows("cell"), self.rows("pixels"))
        confusion = confusion.reshape(NUM_LABELS, NUM_LABELS)
        per_class = {k: _iou(confusion, (k,)) for k in _EVALUATED}
        per_group = {name: _iou(confusion, labels) for name, labels in GROUPS.items()}
        per_class_iiou = {k: self._iiou(confusion, "right_label", (k,), (k,)) for k in AVERAGE_PIXELS}
        per_group_iiou = {
            name: self._iiou(confusion, "right_group", GROUPS[name], labels) for name, labels in INSTANCE_GROUPS.items()
        }
        return CityscapesIoU(
            iou=_mean(per_class),
            iiou=_mean(per_class_iiou),
            group_iou=_mean(per_group),
            group_iiou=_mean(per_group_iiou),
            per_class=per_class,
            per_class_iiou=per_class_iiou,
            per_group=per_group,
            per_group_iiou=per_group_iiou,
        )

    def _iiou(
        self, confusion: np.ndarray, right: str, truth_labels: Sequence[int], labels: Sequence[int]
    ) -> float | None:
        """Return the iIoU of a set of labels; `right` is the column with the correct pixels of every instance."""
        label, size = self.rows("instance_label"), self.rows("instance_pixels")
        chosen = np.isin(label, truth_labels)
        weight = np.array([AVERAGE_PIXELS[k] for k in label[chosen].tolist()]) / size[chosen]
        tp = float((self.rows(right)[chosen] * weight).sum())
        fn = float(((size - self.rows(right))[chosen] * weight).sum())
        fp = int(confusion[np.ix_([k for k in _EVALUATED if k not in labels], labels)].sum())
        return tp / (tp + fp + fn) if tp + fp + fn else None


def count_cityscapes(truth: np.ndarray, predicted: np.ndarray) -> CityscapesPixels:
    """Return the record of one image; arguments as in `CityscapesIoUState.update`.

    Raises ValueError if sizes differ or a label does not exist.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"the truth has shape {truth.shape}, but the prediction has {predicted.shape}")
    truth_ids, predicted_labels, lengths = common_runs(truth, predicted)
    ids, positions = compact_ids(truth_ids)
    values = np.array(ids)
    labels = np.where(values < 1000, values, values // 1000)
    for side, largest in (("truth", labels.max(initial=0)), ("prediction", predicted.max(initial=0))):
        if largest >= NUM_LABELS:
            raise ValueError(f"the {side} has label id {largest}; label ids of Cityscapes are 0..{NUM_LABELS - 1}")
    cell = positions.astype(np.intp) * NUM_LABELS + predicted_labels
    by_id = np.bincount(cell, weights=lengths, minlength=len(ids) * NUM_LABELS).astype(np.int64)
    by_id = by_id.reshape(len(ids), NUM_LABELS)
    confusion = np.zeros((NUM_LABELS, NUM_LABELS), dtype=np.int64)
    np.add.at(confusion, labels, by_id)
    cells = np.flatnonzero(confusion)
    rows = np.flatnonzero((values > 1000) & np.isin(labels, list(AVERAGE_PIXELS)))
    group_of = {k: list(members) for members in INSTANCE_GROUPS.values() for k in members}
    return CityscapesPixels(
        cell=cells,
        pixels=confusion.ravel()[cells],
        instance_label=labels[rows],
        instance_pixels=by_id[rows].sum(axis=1),
        right_label=by_id[rows, labels[rows]],
        right_group=np.array([by_id[row, group_of[int(labels[row])]].sum() for row in rows]),
    )


def _iou(confusion: np.ndarray, labels: Sequence[int]) -> float | None:
    """Return the IoU of a set of labels. Pixels whose truth is not evaluated do not count as errors."""
    tp = int(confusion[np.ix_(labels, labels)].sum())
    fn = int(confusion[list(labels)].sum()) - tp
    fp = int(confusion[np.ix_([k for k in _EVALUATED if k not in labels], labels)].sum())
    return tp / (tp + fp + fn) if tp + fp + fn else None


def _mean(scores: Mapping[int, float | None] | Mapping[str, float | None]) -> float | None:
    known = [score for score in scores.values() if score is not None]
    return sum(known) / len(known) if known else None
