"""Score thresholds for detections, by class, that reach a given precision on an evaluation set."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from m2f.cluster.predict.files import Prediction
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.documents import parse_json
from m2f.eval.metrics.average_precision import InstanceDetections
from m2f.eval.metrics.resampled import InstanceImages
from m2f.model.errors import UserError

IOU = 0.5
"""A detection is correct if its IoU with an annotated instance of its class is at least this."""
THRESHOLDS_FILE = "thresholds.json"
"""Name of the file with the thresholds, beside the checkpoint folder of a registered model."""


class ThresholdError(UserError):
    """Thresholds cannot be chosen or read. The message names the precision or the file."""


@dataclass(frozen=True, kw_only=True)
class ClassThreshold:
    """Threshold of one class, with precision and recall on the evaluation set on which it was chosen."""

    threshold: float | None
    """Lowest accepted score. None if no threshold reaches the precision; then all detections are rejected."""
    precision: float | None
    """Share of correct detections among those with at least this score; None if there is no threshold."""
    recall: float | None
    """Share of the annotated instances that these detections match; None if the class has no instances."""
    detections: int
    """Number of detections with at least this score."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of all thing classes, and the precision and evaluation set for which they were chosen."""

    precision: float
    dataset: str
    """Name of the evaluation set."""
    fingerprint: str
    """Fingerprint of the data of the evaluation set."""
    classes: Mapping[str, ClassThreshold]
    """Thresholds by class name."""

    def to_json(self) -> str:
        """Return the JSON text that is stored with a registered model."""
        return json.dumps({"iou": IOU, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Thresholds:
        """Parse the JSON text of the file `source`. Raises ThresholdError, which names the file, if it is invalid."""
        try:
            content = parse_json(text)
            classes = {str(name): ClassThreshold(**row) for name, row in content.pop("classes").items()}
            content.pop("iou")
            return cls(**content, classes=classes)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ThresholdError(
                f"{source}: cannot parse the thresholds ({error}); register the checkpoint again"
            ) from error

    def min_scores(self, classes: Sequence[Category]) -> np.ndarray:
        """Return the lowest accepted score [K] by label.

        The score is infinity if no threshold reaches the precision for a class, and 0 if the class is not listed.
        """
        return np.array([_min_score(self.classes.get(category.name)) for category in classes])


def _min_score(threshold: ClassThreshold | None) -> float:
    if threshold is None:
        return 0.0
    return math.inf if threshold.threshold is None else threshold.threshold


def accepted(prediction: Prediction, min_scores: np.ndarray | None) -> Prediction:
    """Return the detections whose score is at least that of their class in `min_scores` [K]; None accepts all.

    Panoptic and semantic predictions are returned unchanged.
    """
    if min_scores is None or not isinstance(prediction, InstanceDetections):
        return prediction
    is_kept = prediction.scores >= min_scores[prediction.labels]
    columns = {name: getattr(prediction, name)[is_kept] for name in ("mask_index", "labels", "scores")}
    return replace(prediction, **columns)


def choose_thresholds(images: InstanceImages, names: Sequence[str], precision: float) -> dict[str, ClassThreshold]:
    """Choose the lowest threshold of every class at which the share of correct detections is at least `precision`.

    Args:
        images: match records of all images. Their labels are positions in `names`.
        names: names of the classes.
        precision: above 0 and at most 1.

    Raises:
        ThresholdError: `precision` is out of range, or two classes have the same name.
    """
    if not 0 < precision <= 1:
        raise ThresholdError(f"--precision is {precision}; it must be above 0 and at most 1")
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ThresholdError(
            f"--precision: several thing classes have the name {', '.join(repeated)}, but thresholds are stored by "
            "name; register without --precision, or train with distinct names"
        )
    labels, scores = images.label.values, images.score.values
    correct = (images.matched.values & 1).astype(bool)  # bit 0: the IoU threshold of 0.5
    is_counted = ~(images.ignored.values & 1).astype(bool)
    truth = np.bincount(images.truth_label.values, images.truth_count.values, minlength=len(names))
    chosen = {}
    for label, name in enumerate(names):
        selected = is_counted & (labels == label)
        chosen[name] = _choose_threshold(scores[selected], correct[selected], int(truth[label]), precision)
    return chosen


def _choose_threshold(scores: np.ndarray, correct: np.ndarray, truth: int, precision: float) -> ClassThreshold:
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(correct[order])
    shares = found / np.arange(1, len(scores) + 1)
    # A threshold cannot separate equal scores, so only the last detection of each score can be the lowest.
    is_last_of_score = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
    valid = np.flatnonzero(is_last_of_score & (shares >= precision))
    if not len(valid):
        return ClassThreshold(threshold=None, precision=None, recall=0.0 if truth else None, detections=0)
    last = int(valid[-1])
    return ClassThreshold(
        threshold=float(scores[last]),
        precision=float(shares[last]),
        recall=float(found[last]) / truth if truth else None,
        detections=last + 1,
    )
