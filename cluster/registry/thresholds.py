"""Thresholds of detections, class by class, that reach a stated precision on an evaluated set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.documents import parse_json
from m2f.eval.metrics.resampled import InstanceImages
from m2f.model.errors import UserError

IOU = 0.5
"""A detection is right where it overlaps an annotated instance of its class by more than this."""


class ThresholdError(UserError):
    """Thresholds that cannot be chosen or read. Names the precision or the file."""


@dataclass(frozen=True, kw_only=True)
class ClassThreshold:
    """Of one class. The figures are those on the set that the threshold was chosen on."""

    threshold: float | None
    """Lowest score that counts; None where no threshold reaches the precision, and nothing of the class counts."""
    precision: float | None
    """Share of the detections from the threshold on that are right."""
    recall: float | None
    """Share of the annotated instances that they find; None for a class without any."""
    detections: int
    """Detections from the threshold on."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Of all classes that are things, and what they were chosen for."""

    precision: float
    dataset: str
    """Name of the evaluated set."""
    fingerprint: str
    """Of its data."""
    classes: Mapping[str, ClassThreshold]
    """By name of the class."""

    def to_json(self) -> str:
        """As it travels with a model."""
        return json.dumps({"iou": IOU, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Thresholds:
        """Back from a file. Raises ThresholdError naming `source`."""
        try:
            content = parse_json(text)
            classes = {str(name): ClassThreshold(**row) for name, row in content.pop("classes").items()}
            content.pop("iou")
            return cls(**content, classes=classes)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ThresholdError(f"{source} holds no thresholds ({error}); register the checkpoint again") from error

    def lowest(self, classes: Sequence[Category]) -> np.ndarray:
        """Lowest score that counts [K], by label; infinity for a class of which nothing counts."""
        found = [self.classes.get(category.name) for category in classes]
        return np.array([0.0 if one is None else np.inf if one.threshold is None else one.threshold for one in found])


def choose_thresholds(images: InstanceImages, names: Sequence[str], precision: float) -> dict[str, ClassThreshold]:
    """For every class the lowest threshold whose detections are right in at least a share `precision` of the cases.

    Args:
        images: match records of all images; labels are positions in `names`.
        names: of the classes.
        precision: from 0 to 1.

    Raises ThresholdError for another precision.
    """
    if not 0 < precision <= 1:
        raise ThresholdError(f"--precision is {precision}; it must be above 0 and at most 1")
    labels, scores = images.label.values, images.score.values
    right = (images.matched.values & 1).astype(bool)  # bit 0: the IoU threshold of 0.5
    counted = ~(images.ignored.values & 1).astype(bool)
    truth = np.bincount(images.truth_label.values, images.truth_count.values, minlength=len(names))
    chosen = {}
    for label, name in enumerate(names):
        mine = counted & (labels == label)
        chosen[name] = _choose(scores[mine], right[mine], int(truth[label]), precision)
    return chosen


def _choose(scores: np.ndarray, right: np.ndarray, truth: int, precision: float) -> ClassThreshold:
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order])
    shares = found / np.arange(1, len(scores) + 1)
    ends = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # equal scores pass a threshold together
    fit = np.flatnonzero(ends & (shares >= precision))
    if not len(fit):
        return ClassThreshold(threshold=None, precision=None, recall=0.0 if truth else None, detections=0)
    last = int(fit[-1])
    return ClassThreshold(
        threshold=float(scores[last]),
        precision=float(shares[last]),
        recall=float(found[last]) / truth if truth else None,
        detections=last + 1,
    )
