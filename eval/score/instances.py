"""Mask AP of COCO results. Values equal those of pycocotools and boundary-iou-api, except for three differences.

These make the result independent of details of the files. The size of a detection is that of its mask, even if the
results contain boxes (pycocotools would use the box). Annotations with id 0 can be matched. Annotations that share an
id all count (pycocotools keeps the last one).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.eval.metrics.average_precision import AveragePrecision, AveragePrecisionState
from m2f.eval.metrics.base import MetricState, Record, percent
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.metrics.box_average_precision import match_boxes
from m2f.eval.metrics.error_types import ErrorState, instance_errors
from m2f.eval.metrics.extra.box import BOX_INSTANCE
from m2f.eval.metrics.instance_matching import (
    DetectionRecord,
    InstanceDetections,
    InstanceTruth,
    area_ranges,
    class_agnostic_detections,
    class_agnostic_truth,
    match_images,
)
from m2f.eval.metrics.segment_errors import SegmentErrorState, assign_outcomes, instance_candidates
from m2f.eval.results.extra import ExtraResults
from m2f.eval.results.results import EvaluationResults, EvaluationSubject, columns
from m2f.eval.score.files import (
    ScoredCategory,
    match_predictions,
    read_categories,
    read_document,
)
from m2f.eval.score.instance_boxes import box_detections, box_truth
from m2f.eval.score.instance_files import (
    ImageEntries,
    InstanceFiles,
    describe_missing_results,
    describe_unlisted_images,
    get_category_id,
    mask_pixels,
    read_detections,
    read_entries,
    read_results,
    read_truth,
)
from m2f.eval.score.options import (
    EVERYTHING,
    ScoreOptions,
    category_table,
    chosen_images,
    chosen_labels,
    scope_notes,
    score_subject,
    select_classes,
    unknown_notes,
)
from m2f.eval.score.scoring import MultiRecord, ScoreReport, Scoring, score_report
from m2f.eval.score.truth_doubts import TruthDoubts, instance_doubts, sampled
from m2f.model.errors import UserError

MAX_DETS = (1, 10, 100)
CLASS_AGNOSTIC_MAX_DETS = (1, 10, 100, 1000)


def instance_scoring(
    truth: Path,
    predictions: Path,
    *,
    boundary: bool,
    class_agnostic: bool,
    boxes: bool = False,
    detailed: bool = False,
    options: ScoreOptions = EVERYTHING,
) -> Scoring[ImageEntries, DetectionRecord, AveragePrecision]:
    """Prepare the scoring of COCO's 12 metrics over the images of the truth.

    `class_agnostic` treats all classes as one and adds AR1000. `boxes` adds the metrics of boxes. `detailed` adds
    errors and confusion to plain mask AP of all classes. Raises EvaluationError for unusable JSON files and for results
    of unknown images.
    """
    document = read_document(truth, "images", "annotations", "categories")
    categories = tuple(sorted(read_categories(document, truth), key=lambda c: c.id))
    labels = {c.id: label for label, c in enumerate(categories)}
    results = read_results(predictions, with_boxes=boxes)
    matched = match_predictions(results, predictions, categories, truth, compare_kinds=False)
    files = InstanceFiles(truth, predictions)
    chosen = chosen_labels(categories, options, str(truth))
    images = read_entries(document, results, files)
    unlisted = describe_unlisted_images(images, len(document["annotations"]), truth)
    selected = chosen_images((image.id for image in images), options, str(truth))
    images = [image for image in images if selected is None or str(image.id) in selected]
    predicted_labels = matched.labels(labels)
    unknown = _unknown_categories(images, predicted_labels, matched.dropped) if options.ignore_unknown else frozenset()
    limits = CLASS_AGNOSTIC_MAX_DETS if class_agnostic else MAX_DETS
    limits = tuple(sorted(options.max_dets or limits))
    ratio = BOUNDARY_RATIO if boundary else None
    names = ["Boundary" * boundary, "class-agnostic" * class_agnostic, "mask AP"]
    notes = [matched.note, unlisted, describe_missing_results(images, predictions)]
    doubts = sum((_doubts(image, labels, files) for image in sampled(images)), TruthDoubts())
    doubt_lines = doubts.describe("AP by size uses the stated areas")
    notes = [*filter(None, notes), *unknown_notes(unknown), *doubt_lines]
    title, shown_notes = " ".join(filter(None, names)), [*scope_notes(options, len(images)), *notes]
    ranges = area_ranges(options.area_bounds)
    work = _ScoreImages(
        files, labels, predicted_labels, matched.dropped | unknown, class_agnostic, limits[-1], ratio, ranges
    )
    extra_states: dict[str, MetricState] = {}
    if boxes:
        extra_states["box"] = AveragePrecisionState(len(categories), limits, area_bounds=options.area_bounds)
    if detailed and chosen is None and not (boundary or class_agnostic):
        extra_states["segments"] = SegmentErrorState(len(categories))
        extra_states["errors"] = ErrorState(len(categories), "AP50")
    num_classes = 1 if class_agnostic else len(categories)
    shown = tuple(c for label, c in enumerate(categories) if chosen is None or label in chosen)
    table, subject = category_table(categories, things=True), score_subject(predictions, options, len(images))
    shown_limit = limits[-1] if options.max_dets else MAX_DETS[-1]
    return Scoring(
        tasks=images,
        work=_ScoreExtras(work, frozenset(extra_states), chosen) if extra_states or chosen is not None else work,
        state=AveragePrecisionState(num_classes, limits, ratio, options.area_bounds),
        report=partial(
            _report,
            () if class_agnostic else categories,
            shown,
            title,
            len(images),
            shown_notes,
            shown_limit,
            extra_states,
        ),
        results=None if class_agnostic else partial(_results, table, subject, extra_states, len(images), notes),
        extra_states=extra_states,
        names=[str(image.id) for image in images],
        limit=shown_limit,
        doubts=doubt_lines,
    )


def _doubts(image: ImageEntries, labels: Mapping[int, int], files: InstanceFiles) -> TruthDoubts:
    """Count the doubts about the truth of one image. Errors are left to the scoring of the image."""
    try:
        return instance_doubts(read_truth(image, labels, files))
    except (UserError, TypeError):
        return TruthDoubts()


def _unknown_categories(
    images: Sequence[ImageEntries], known: Mapping[int, int], dropped: Collection[int]
) -> frozenset[int]:
    """Return category ids of the results that are neither known nor dropped."""
    category_ids = {
        category_id
        for image in images
        for result in image.results
        if isinstance(category_id := get_category_id(result), int)
    }
    return frozenset(category_ids - known.keys() - set(dropped))


def _results(
    table: CategoryTable,
    subject: EvaluationSubject,
    extra_states: Mapping[str, MetricState],
    num_images: int,
    notes: Sequence[str],
    result: AveragePrecision,
) -> EvaluationResults:
    """Return the results for a page and for Python."""
    details = {name: extra_states[name].compute() for name in ("segments", "errors") if name in extra_states}
    return EvaluationResults(
        subject=subject,
        categories=table,
        num_images=num_images,
        panoptic=None,
        instance=result,
        semantic=None,
        notes=notes,
        extra=ExtraResults({BOX_INSTANCE.key: extra_states["box"].compute()} if "box" in extra_states else {}),
        **details,
    )


@dataclass(frozen=True)
class _ScoreImages:
    """Reads and matches several images."""

    files: InstanceFiles
    labels: Mapping[int, int]
    """Class by category id of the truth."""
    predicted_labels: Mapping[int, int]
    """Class by category id of the predictions."""
    dropped: frozenset[int]
    """Category ids of the predictions that are not scored."""
    class_agnostic: bool
    limit: int
    boundary_ratio: float | None
    ranges: np.ndarray
    """Ranges of areas, see `area_ranges`."""

    def __call__(self, images: Sequence[ImageEntries]) -> list[DetectionRecord]:
        return self.match(self.read(images))

    def read(self, images: Sequence[ImageEntries]) -> list[tuple[InstanceTruth, InstanceDetections]]:
        """Return truth and detections of every image."""
        return [
            (
                read_truth(image, self.labels, self.files, pixels.annotations),
                read_detections(image, self.predicted_labels, self.dropped, self.files, pixels.results),
            )
            for image, pixels in zip(images, mask_pixels(images), strict=True)
        ]

    def match(self, images: Sequence[tuple[InstanceTruth, InstanceDetections]]) -> list[DetectionRecord]:
        """Return the records for mask AP."""
        if self.class_agnostic:
            images = [
                (class_agnostic_truth(truth), class_agnostic_detections(detections)) for truth, detections in images
            ]
        return match_images(images, self.limit, self.boundary_ratio, self.ranges)


@dataclass(frozen=True)
class _ScoreExtras:
    """Does the work of `_ScoreImages` for some classes, or with additional metrics."""

    image: _ScoreImages
    metrics: frozenset[str]
    """Additional metrics, out of box, segments and errors."""
    chosen: frozenset[int] | None
    """Classes to keep; None: all."""

    def __call__(self, images: Sequence[ImageEntries]) -> list[MultiRecord[DetectionRecord]]:
        pairs = self.image.read(images)
        records = self.image.match(pairs)
        return [self._score_image(*image_inputs) for image_inputs in zip(images, records, pairs, strict=True)]

    def _score_image(
        self, image: ImageEntries, record: DetectionRecord, pair: tuple[InstanceTruth, InstanceDetections]
    ) -> MultiRecord[DetectionRecord]:
        score, (truth, detections) = self.image, pair
        extra_records: dict[str, Record] = {}
        if "box" in self.metrics:
            annotated = box_truth(image, truth, score.files)
            detected = box_detections(image, detections, score.dropped, score.files)
            extra_records["box"] = self._select_classes(match_boxes(annotated, detected, score.limit, score.ranges))
        if "segments" in self.metrics:
            extra_records["segments"] = assign_outcomes(instance_candidates(truth, detections))
        if "errors" in self.metrics:
            extra_records["errors"] = instance_errors(truth, detections, score.limit)
        return MultiRecord(self._select_classes(record), extra_records)

    def _select_classes(self, record: DetectionRecord) -> DetectionRecord:
        return record if self.chosen is None else select_classes(record, self.chosen)


def _report(
    categories: tuple[ScoredCategory, ...],
    shown: tuple[ScoredCategory, ...],
    title: str,
    num_images: int,
    notes: Sequence[str],
    limit: int,
    extra_states: Mapping[str, MetricState],
    result: AveragePrecision,
) -> ScoreReport:
    numbers = result.stats_at(limit)
    content: dict[str, Any] = {**numbers, **_by_class(categories, result)}
    tables = [columns(list(numbers), [[percent(value) for value in numbers.values()]])]
    if "box" in extra_states:
        boxes: AveragePrecision = extra_states["box"].compute()
        content["box"] = {**boxes.stats, **_by_class(categories, boxes)}
        tables.append(columns(["box", *boxes.stats], [["", *map(percent, boxes.stats.values())]]))
    if categories:
        rows = []
        for category in categories:
            stats = content["per_class_stats"][str(category.id)]
            if category in shown and stats["AP"] >= 0:
                rows.append([category.name, *map(percent, stats.values())])
        tables.append(columns(["class", *result.stats], rows))
    return score_report(content, f"{title}, {num_images} images, in per cent", num_images, notes, tables)


def _by_class(categories: Sequence[ScoredCategory], result: AveragePrecision) -> dict[str, Any]:
    """Return AP, all metrics and the name of each category, by id."""
    if not categories:
        return {"per_class": {}}
    return {
        "per_class": {str(c.id): ap for c, ap in zip(categories, result.per_class, strict=True)},
        "per_class_stats": {str(c.id): result.class_stats(label) for label, c in enumerate(categories)},
        "names": {str(c.id): c.name for c in categories},
    }
