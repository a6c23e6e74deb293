"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4) as a mergeable state.

Follows the COCO panoptic evaluation exactly, including its rules for crowds and void. All intersections
and areas of an image come from one table of overlaps between its two id maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m2f.data_pipeline.readers.masks import area_mismatches
from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState, Record, column
from m2f.eval.metrics.boundary import boundary_width, outline_map
from m2f.eval.metrics.overlaps import InconsistentMapError, InconsistentTruthError, Overlaps, count_overlaps

MATCH_IOU = 0.5
"""IoU that a match must exceed. Segments do not overlap, so each can exceed 0.5 with at most one other."""
MAX_IGNORED = 0.5
"""An unmatched prediction is ignored if a larger share of its area than this lies in void and crowd."""
AREA_BOUNDS = (32.0**2, 96.0**2)
"""Smallest area of a medium and of a large segment, in pixels."""
SIZES = ("small", "medium", "large")
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class TruthSegment:
    """An annotated segment. Its pixels have its id in the map."""

    label: int
    """Contiguous class index."""
    area: float
    """Area in pixels, as stated by the annotation. The union uses it instead of the pixel count."""
    is_crowd: bool


@dataclass(frozen=True)
class PanopticTruth:
    """Ground truth of one image.

    VOID_ID marks void. Pixels with another id that has no segment count as background: they belong to no segment, and
    predictions on them are not ignored.
    """

    id_map: np.ndarray
    """[H, W] integers."""
    segments: Mapping[int, TruthSegment]
    """Segments by id, in the order of the annotation. If a class has several crowds, only the last one counts."""


@dataclass(frozen=True)
class PanopticPrediction:
    """Prediction for one image."""

    id_map: np.ndarray
    """[H, W] integers; VOID_ID means no segment."""
    labels: Mapping[int, int]
    """Contiguous class index of each segment id."""


def _empty_column() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class PanopticRecord(Record):
    """Matches and errors of one image, with their classes."""

    matched_label: np.ndarray = field(metadata=column("int32"))
    matched_iou: np.ndarray = field(metadata=column("float64"))
    false_positive: np.ndarray = field(metadata=column("int32"))
    """Class of every unmatched prediction that counts."""
    false_negative: np.ndarray = field(metadata=column("int32"))
    """Class of every unmatched annotated segment that counts."""
    matched_area: np.ndarray = field(
        default_factory=_empty_column, metadata=column("float64", aligned_with="matched_label")
    )
    """Area stated by the annotation. In records without areas, all three area columns are NaN."""
    false_positive_area: np.ndarray = field(
        default_factory=_empty_column, metadata=column("float64", aligned_with="false_positive")
    )
    """Pixels of the prediction."""
    false_negative_area: np.ndarray = field(
        default_factory=_empty_column, metadata=column("float64", aligned_with="false_negative")
    )
    """Area stated by the annotation."""


@dataclass(frozen=True)
class Quality:
    """PQ, SQ and RQ, each averaged over the classes that occur; as shares, not per cent."""

    pq: float
    sq: float
    rq: float
    num_classes: int
    """Number of averaged classes: those with a match or an error."""


@dataclass(frozen=True)
class ClassQuality:
    """Quality of one class, PQ = SQ x RQ, as shares; zeros if the class does not occur."""

    pq: float
    sq: float
    rq: float
    iou: float
    """Sum of the IoUs of all matches."""
    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def occurs(self) -> bool:
        """Whether the class has a match or an error, so that it counts in averages."""
        return self.true_positives + self.false_positives + self.false_negatives > 0


@dataclass(frozen=True)
class PanopticQuality:
    """Panoptic quality of an image set. A group (all, things or stuff) in which no class occurs is None."""

    all: Quality | None
    things: Quality | None
    stuff: Quality | None
    per_class: tuple[ClassQuality, ...]
    by_size: Mapping[str, Quality | None] = field(default_factory=dict)
    """Quality over all classes by segment size. Matches and misses have the size of the annotated segment, false
    positives that of the prediction. Empty if records have no areas."""


class PanopticQualityState(MetricState[PanopticRecord, PanopticQuality]):
    """Matches and errors per image. `is_thing[label]` is whether the class with this label is a thing.

    With `boundary_ratio` (see `m2f.eval.metrics.boundary`) the metric is Boundary PQ. `area_bounds` holds the smallest
    area of a medium and of a large segment, in pixels.
    """

    name = "panoptic quality"

    def __init__(
        self,
        is_thing: Sequence[bool],
        boundary_ratio: float | None = None,
        area_bounds: Sequence[float] = AREA_BOUNDS,
    ) -> None:
        settings: dict[str, Any] = {"is_thing": list(is_thing), "boundary_ratio": boundary_ratio}
        if tuple(area_bounds) != AREA_BOUNDS:  # saved states without this entry use the default
            settings["area_bounds"] = list(area_bounds)
        super().__init__(PanopticRecord, settings)
        self.is_thing = tuple(is_thing)
        self.boundary_ratio = boundary_ratio
        self.area_bounds = tuple(area_bounds)

    def update(self, image_id: int, truth: PanopticTruth, prediction: PanopticPrediction) -> None:
        """Match the segments of one image.

        Raises:
            EvaluationError: see the errors of `match_panoptic`.
        """
        try:
            self.add(image_id, match_panoptic(truth, prediction, self.boundary_ratio))
        except InconsistentMapError as error:
            raise EvaluationError(f"image {image_id}: {error}") from error

    def compute(self) -> PanopticQuality:
        """Compute the averages over all classes, things and stuff, and the quality of every class."""
        per_class = self._per_class()
        pairs = list(zip(per_class, self.is_thing, strict=True))
        return PanopticQuality(
            all=_average(per_class),
            things=_average([quality for quality, is_thing in pairs if is_thing]),
            stuff=_average([quality for quality, is_thing in pairs if not is_thing]),
            per_class=per_class,
            by_size=self._by_size(),
        )

    def _by_size(self) -> dict[str, Quality | None]:
        """Return the average quality by size, each over the classes with a match or an error of that size."""
        sides = ("matched_area", "false_positive_area", "false_negative_area")
        areas = [self.rows(side) for side in sides]
        if any(np.isnan(side).any() for side in areas):
            return {}
        # A segment whose area equals a bound belongs to the larger size.
        sizes = [np.searchsorted(self.area_bounds, side, side="right") for side in areas]
        return {
            name: _average(self._per_class(*(side == position for side in sizes)))
            for position, name in enumerate(SIZES)
        }

    def _per_class(
        self,
        matches: np.ndarray | slice = _ALL,
        wrong: np.ndarray | slice = _ALL,
        missed: np.ndarray | slice = _ALL,
    ) -> tuple[ClassQuality, ...]:
        """Compute the quality of every class from the selected rows: matches, false positives and false negatives."""
        num_classes = len(self.is_thing)
        matched = self.rows("matched_label")[matches]
        # bincount adds in row order, image by image, so the bits of the sums do not depend on the number of actors.
        iou = np.bincount(matched, weights=self.rows("matched_iou")[matches], minlength=num_classes)
        true_positives = np.bincount(matched, minlength=num_classes)
        false_positives = np.bincount(self.rows("false_positive")[wrong], minlength=num_classes)
        false_negatives = np.bincount(self.rows("false_negative")[missed], minlength=num_classes)
        counts = zip(
            iou.tolist(), true_positives.tolist(), false_positives.tolist(), false_negatives.tolist(), strict=True
        )
        return tuple(_class_quality(*row) for row in counts)

    def image_quality(self, image_id: int) -> float | None:
        """Return the PQ of one image, pooled over all classes; None if it has no match and no error.

        Used to choose and caption pictures. It is not comparable with published numbers.
        """
        record = self.record(image_id)
        tp, fp, fn = len(record.matched_label), len(record.false_positive), len(record.false_negative)
        return float(record.matched_iou.sum()) / (tp + 0.5 * fp + 0.5 * fn) if tp + fp + fn else None


def match_panoptic(
    truth: PanopticTruth, prediction: PanopticPrediction, boundary_ratio: float | None = None
) -> PanopticRecord:
    """Match the segments of one image, and return its matches, false positives and false negatives.

    Matches are in ascending order of (truth id, predicted id). With `boundary_ratio`, the IoU of a match is the smaller
    of its mask IoU and its boundary IoU (Boundary PQ).

    Raises:
        InconsistentMapError: the maps differ in size, or the prediction's map and labels disagree.
        InconsistentTruthError: the truth's map shares no id with its segments, or the IoU of a match is above 1 because
            the stated area is less than half of the pixels. Small segments are not checked, because the area of a
            polygon differs from its pixels along the border.
    """
    overlaps = count_overlaps(truth.id_map, prediction.id_map)
    _check_tables_agree(prediction, overlaps.predicted_area)
    _check_truth_ids(truth, overlaps.truth_area)
    outlines = None if boundary_ratio is None else _count_outlines(truth.id_map, prediction.id_map, boundary_ratio)

    matches: list[tuple[int, float, float]] = []
    matched_truth, matched_prediction = set(), set()
    for truth_id, predicted_id in overlaps.pixels:
        segment = truth.segments.get(truth_id)
        if segment is None or segment.is_crowd or segment.label != prediction.labels.get(predicted_id):
            continue
        iou = overlaps.iou(truth_id, predicted_id, segment.area)
        if iou > 1:
            _check_area(truth_id, segment, overlaps.truth_area[truth_id], iou)
        if outlines is not None:
            iou = min(iou, outlines.iou(truth_id, predicted_id, outlines.truth_area[truth_id]))
        if iou > MATCH_IOU:
            matches.append((segment.label, iou, segment.area))
            matched_truth.add(truth_id)
            matched_prediction.add(predicted_id)

    unmatched = {i: label for i, label in prediction.labels.items() if i not in matched_prediction}
    false_positive = sorted(
        (label, overlaps.predicted_area[i])
        for i, label in unmatched.items()
        if _ignored_share(i, label, truth, overlaps) <= MAX_IGNORED
    )
    false_negative = sorted(
        (s.label, s.area) for i, s in truth.segments.items() if i not in matched_truth and not s.is_crowd
    )
    return PanopticRecord(
        matched_label=np.array([label for label, _, _ in matches]),
        matched_iou=np.array([iou for _, iou, _ in matches]),
        false_positive=np.array([label for label, _ in false_positive]),
        false_negative=np.array([label for label, _ in false_negative]),
        matched_area=np.array([area for _, _, area in matches]),
        false_positive_area=np.array([area for _, area in false_positive]),
        false_negative_area=np.array([area for _, area in false_negative]),
    )


def _count_outlines(truth: np.ndarray, predicted: np.ndarray, ratio: float) -> Overlaps:
    """Count the overlaps of the segments' boundaries. Areas in the result are numbers of boundary pixels."""
    height, width = truth.shape
    steps = boundary_width((height, width), ratio)
    return count_overlaps(outline_map(truth, steps), outline_map(predicted, steps))


def _ignored_share(predicted_id: int, label: int, truth: PanopticTruth, overlaps: Overlaps) -> float:
    """Return the share of a predicted segment's area in void or in the last listed crowd of its class."""
    crowds = [i for i, segment in truth.segments.items() if segment.is_crowd and segment.label == label]
    ignored = sum(overlaps.pixels.get((i, predicted_id), 0) for i in (VOID_ID, *crowds[-1:]))
    return ignored / overlaps.predicted_area[predicted_id]


def _check_tables_agree(prediction: PanopticPrediction, area: Mapping[int, int]) -> None:
    """Raise InconsistentMapError if an id is only in the predicted map or only in the segment list."""
    unlisted = [i for i, pixels in area.items() if pixels and i != VOID_ID and i not in prediction.labels]
    if unlisted:
        raise InconsistentMapError(f"the predicted map has ids that are missing in the segment list: {unlisted[:5]}")
    empty = [i for i in prediction.labels if not area.get(i)]
    if empty:
        raise InconsistentMapError(f"predicted segments have no pixels in the map: {empty[:5]}")


def _check_truth_ids(truth: PanopticTruth, area: Mapping[int, int]) -> None:
    """Raise InconsistentTruthError if map and table both have ids, but share none."""
    in_map, listed = area.keys() - {VOID_ID}, truth.segments.keys() - {VOID_ID}
    if in_map and listed and in_map.isdisjoint(listed):
        raise InconsistentTruthError(
            f"the truth's map has the ids {sorted(in_map)[:5]}, but its list of segments has {sorted(listed)[:5]}; "
            "use the map and the list of the same version"
        )


def _check_area(truth_id: int, segment: TruthSegment, pixels: int, iou: float) -> None:
    """Raise InconsistentTruthError if the stated area of a segment is wrong, not merely rounded."""
    if area_mismatches([(segment.area, pixels)]):
        raise InconsistentTruthError(
            f"segment {truth_id} of the truth has {pixels} pixels, but states an area of {segment.area:g}, so an IoU "
            f"is {iou:.1f}; state the number of pixels of every segment"
        )


def _class_quality(iou: float, tp: int, fp: int, fn: int) -> ClassQuality:
    if tp + fp + fn == 0:
        return ClassQuality(0.0, 0.0, 0.0, 0.0, 0, 0, 0)
    size = tp + 0.5 * fp + 0.5 * fn
    return ClassQuality(iou / size, iou / tp if tp else 0.0, tp / size, iou, tp, fp, fn)


def _average(classes: Sequence[ClassQuality]) -> Quality | None:
    """Return the mean over the classes that occur; None if none occurs."""
    counted = [c for c in classes if c.occurs]
    if not counted:
        return None
    n = len(counted)
    return Quality(sum(c.pq for c in counted) / n, sum(c.sq for c in counted) / n, sum(c.rq for c in counted) / n, n)
