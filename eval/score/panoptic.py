"""PQ of panoptic results in COCO format. Values equal those of panopticapi and boundary-iou-api."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.base import MetricState
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.metrics.engine import EngineRefusedError, PanopticPair, match_panoptic_files
from m2f.eval.metrics.error_types import ErrorState, panoptic_errors
from m2f.eval.metrics.overlaps import InconsistentMapError, InconsistentTruthError
from m2f.eval.metrics.panoptic_quality import (
    ClassQuality,
    PanopticPrediction,
    PanopticQuality,
    PanopticQualityState,
    PanopticRecord,
    PanopticTruth,
    Quality,
    TruthSegment,
    match_panoptic,
)
from m2f.eval.metrics.segment_errors import SegmentErrorState, assign_outcomes, panoptic_candidates
from m2f.eval.results.results import EvaluationResults, EvaluationSubject, columns
from m2f.eval.score.files import (
    ScoredCategory,
    first_few,
    is_plain_id_map,
    mask_file,
    match_predictions,
    read_area,
    read_categories,
    read_document,
    read_flag,
    read_ids,
    read_int,
    require_field,
    require_folder,
    require_new_image,
)
from m2f.eval.score.options import (
    EVERYTHING,
    ScoreOptions,
    SelectClasses,
    category_table,
    chosen_images,
    chosen_labels,
    scope_notes,
    score_subject,
    unknown_notes,
)
from m2f.eval.score.scoring import MultiRecord, OneByOne, ScoreReport, Scoring, score_report
from m2f.eval.score.truth_doubts import TruthDoubts, describe_high_quality, panoptic_doubts, sampled

LabelT = TypeVar("LabelT", int, int | None)
_Pair = tuple[dict[str, Any], dict[str, Any]]
"""Annotation and prediction of one image."""


@dataclass(frozen=True, kw_only=True)
class PanopticFiles:
    """Truth and predictions, each as a JSON file and a folder of RGB maps."""

    truth: Path
    truth_masks: Path
    predictions: Path
    prediction_masks: Path


def panoptic_scoring(
    files: PanopticFiles, *, boundary: bool, detailed: bool = False, options: ScoreOptions = EVERYTHING
) -> Scoring[_Pair, PanopticRecord, PanopticQuality]:
    """Prepare the scoring of PQ, or Boundary PQ, over all images with an annotation. Notes count all other images.

    `detailed` adds PQ by size, as `options.by_size` does. For PQ of all classes it also adds errors and confusion.
    Raises EvaluationError for unusable JSON files, for repeated images and for images without a prediction.
    """
    document = read_document(files.truth, "annotations", "categories")
    categories = read_categories(document, files.truth)
    if without_kind := [c.name for c in categories if c.is_thing is None]:
        raise EvaluationError(
            f"{files.truth}: {len(without_kind)} categories have no `isthing` (0 or 1), so things and stuff cannot "
            f"be distinguished: {first_few(without_kind)}"
        )
    chosen = chosen_labels(categories, options, str(files.truth))
    annotated = _by_image(document["annotations"], files.truth)
    selected = chosen_images(annotated, options, str(files.truth))
    truth = {i: a for i, a in annotated.items() if selected is None or i in selected}
    predicted = read_document(files.predictions, "annotations")
    matched = match_predictions(predicted, files.predictions, categories, files.truth, compare_kinds=True)
    predictions = _by_image(predicted["annotations"], files.predictions)
    ids = list(truth)
    if missing := [i for i in ids if i not in predictions]:
        raise EvaluationError(
            f"{files.predictions} has no prediction for {len(missing)} of {len(ids)} images: {first_few(missing)}; "
            "an image without segments needs an entry with an empty list"
        )
    require_folder(files.truth_masks, "the maps of the truth")
    require_folder(files.prediction_masks, "the predicted maps")

    ratio = BOUNDARY_RATIO if boundary else None
    labels = {c.id: label for label, c in enumerate(categories)}
    predicted_labels = matched.labels(labels)
    unknown = (
        _unknown_categories(predictions, ids, predicted_labels, matched.dropped)
        if options.ignore_unknown
        else frozenset()
    )
    needs_maps = detailed or boundary or options.by_size
    scored_labels = predicted_labels | dict.fromkeys(matched.dropped | unknown)
    work = _ScoreImage(files, labels, scored_labels, ratio, needs_maps)
    state = PanopticQualityState([bool(c.is_thing) for c in categories], ratio, options.area_bounds)
    extra_states: dict[str, MetricState] = {}
    if detailed and chosen is None and not boundary:
        extra_states = {"segments": SegmentErrorState(len(categories)), "errors": ErrorState(len(categories), "PQ")}
    checked = sampled(list(truth.values()))
    doubts = sum((work.doubts(a) for a in checked), TruthDoubts()).describe("PQ uses the stated areas")
    unscored = _unscored_notes(document.get("images"), annotated, predictions, files)
    notes = [*([matched.note] if matched.note else []), *unscored, *unknown_notes(unknown), *doubts]
    name, shown_notes = "Boundary PQ" if boundary else "PQ", [*scope_notes(options, len(ids)), *notes]
    return Scoring(
        tasks=[(a, predictions[i]) for i, a in truth.items()],
        work=OneByOne(_ScoreDetails(work) if extra_states else work if chosen is None else SelectClasses(work, chosen)),
        state=state,
        report=partial(_report, categories, len(ids), name, shown_notes),
        results=partial(
            _results,
            category_table(categories),
            score_subject(files.predictions, options, len(ids)),
            extra_states,
            len(ids),
            notes,
        ),
        extra_states=extra_states,
        names=ids,
        doubts=doubts,
    )


def _by_image(annotations: Sequence[Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return the annotations of a file by image id. Raises EvaluationError for a missing or repeated id."""
    by_id: dict[str, dict[str, Any]] = {}
    for annotation in annotations:
        image_id = str(require_field(annotation, "image_id", f"{path}: an annotation"))
        require_new_image(image_id, by_id, f"{path}: image {image_id}")
        by_id[image_id] = annotation
    return by_id


def _unscored_notes(
    images: Any, annotated: Collection[str], predictions: Collection[str], files: PanopticFiles
) -> list[str]:
    """Return lines about images that are not scored because the truth has no annotation of them.

    `images` is the list of images in the file of the truth, which may be missing.
    """
    listed = [str(i["id"]) for i in images if isinstance(i, dict) and "id" in i] if isinstance(images, list) else []
    unscored = [i for i in predictions if i not in annotated]
    without = [i for i in listed if i not in annotated]
    notes = []
    if unscored:
        notes.append(
            f"{len(unscored)} of {len(predictions)} predictions are for images without an annotation in {files.truth}; "
            f"they are not scored: {first_few(unscored)}"
        )
    if without:
        notes.append(
            f"{len(without)} of {len(listed)} images in {files.truth} have no annotation; they are not scored: "
            f"{first_few(without)}"
        )
    return notes


def _unknown_categories(
    predictions: Mapping[str, Any], ids: Sequence[str], known: Mapping[int, int], dropped: Collection[int]
) -> frozenset[int]:
    """Return category ids of the predictions that are neither known nor dropped."""
    lists = (listed for i in ids if isinstance(listed := predictions[i].get("segments_info"), list))
    entries = (entry for listed in lists for entry in listed if isinstance(entry, dict))
    category_ids = {category_id for entry in entries if isinstance(category_id := entry.get("category_id"), int)}
    return frozenset(category_ids - known.keys() - set(dropped))


def _results(
    table: CategoryTable,
    subject: EvaluationSubject,
    extra_states: Mapping[str, MetricState],
    num_images: int,
    notes: Sequence[str],
    quality: PanopticQuality,
) -> EvaluationResults:
    """Return the results for a page and for Python."""
    details = {name: state.compute() for name, state in extra_states.items()}
    return EvaluationResults(
        subject=subject,
        categories=table,
        num_images=num_images,
        panoptic=quality,
        instance=None,
        semantic=None,
        notes=_with_doubts(notes, table.categories, quality),
        **details,
    )


@dataclass(frozen=True)
class _ScoreImage:
    """Reads and matches one image."""

    files: PanopticFiles
    labels: Mapping[int, int]
    """Class by category id of the truth."""
    predicted_labels: Mapping[int, int | None]
    """Class by category id of the predictions; None for categories that are not scored."""
    boundary_ratio: float | None
    detailed: bool = True
    """Whether records need the area of every segment. Otherwise the engine's sums by class suffice."""

    def __call__(self, task: _Pair) -> PanopticRecord:
        truth, prediction = task
        where = f"image {truth['image_id']}"
        try:
            if not self.detailed and (record := self._engine_record(truth, prediction, where)) is not None:
                return record
            return self._match(truth, prediction, where)
        except InconsistentTruthError as error:
            path = self.files.truth_masks / truth["file_name"]
            raise EvaluationError(f"{where} ({self.files.truth} and {path}): {error}") from error
        except InconsistentMapError as error:
            path = self.files.prediction_masks / prediction["file_name"]
            raise EvaluationError(f"{where} ({path}): {error}") from error
        except TypeError as error:  # null, a list or text in place of a number
            raise EvaluationError(
                f"{where}: a segment in {self.files.truth} or {self.files.predictions} has a field of the wrong type "
                f"({error})"
            ) from error

    def doubts(self, truth: dict[str, Any]) -> TruthDoubts:
        """Count the doubts about the truth of one image. Errors are left to the scoring of the image."""
        try:
            return panoptic_doubts(self._truth(truth, f"image {truth['image_id']}"))
        except (EvaluationError, TypeError):
            return TruthDoubts()

    def _match(self, truth: dict[str, Any], prediction: dict[str, Any], where: str) -> PanopticRecord:
        return match_panoptic(self._truth(truth, where), self._prediction(prediction, where), self.boundary_ratio)

    def _engine_record(self, truth: dict[str, Any], prediction: dict[str, Any], where: str) -> PanopticRecord | None:
        """Return the engine's record; None if the engine cannot score the files, so `match_panoptic` must."""
        predicted_where = f"{self.files.predictions}: {where}"
        labels, dropped_ids = self._predicted_segments(prediction, predicted_where)
        if dropped_ids:
            return None  # the engine cannot remove their pixels from the map
        pair = PanopticPair(
            truth_map=mask_file(self.files.truth_masks, truth, f"{self.files.truth}: {where}"),
            segments=self._truth_segments(truth, f"{self.files.truth}: {where}"),
            predicted_map=mask_file(self.files.prediction_masks, prediction, predicted_where),
            labels=labels,
        )
        if not (is_plain_id_map(pair.truth_map) and is_plain_id_map(pair.predicted_map)):
            return None
        try:
            record = match_panoptic_files(pair)
        except EngineRefusedError:
            return None
        # The mean of a class may hide one IoU above 1. Counting the pixels of the truth would double the time.
        if pair.segments and (not len(record.matched_iou) or record.matched_iou.max() > 1):
            self._match(truth, prediction, where)  # raises if the cause is the truth, which the engine does not check
        return record

    def _truth(self, annotation: dict[str, Any], where: str) -> PanopticTruth:
        where = f"{self.files.truth}: {where}"
        segments = self._truth_segments(annotation, where)
        return PanopticTruth(read_ids(mask_file(self.files.truth_masks, annotation, where)), segments)

    def _truth_segments(self, annotation: dict[str, Any], where: str) -> dict[int, TruthSegment]:
        return {
            segment_id: _truth_segment(entry, label, f"{where}: segment {segment_id}")
            for segment_id, label, entry in self._segments(annotation, where, self.labels)
        }

    def _prediction(self, annotation: dict[str, Any], where: str) -> PanopticPrediction:
        """Read the prediction of one image, without segments of dropped categories; their pixels become void."""
        where = f"{self.files.predictions}: {where}"
        labels, dropped_ids = self._predicted_segments(annotation, where)
        id_map = read_ids(mask_file(self.files.prediction_masks, annotation, where))
        return PanopticPrediction(np.where(np.isin(id_map, dropped_ids), 0, id_map) if dropped_ids else id_map, labels)

    def _predicted_segments(self, annotation: dict[str, Any], where: str) -> tuple[dict[int, int], list[int]]:
        """Return the class by id of the segments to score, and the ids of the others."""
        labels = {i: label for i, label, _ in self._segments(annotation, where, self.predicted_labels)}
        scored = {i: label for i, label in labels.items() if label is not None}
        return scored, [i for i in labels if i not in scored]

    def _segments(
        self, annotation: dict[str, Any], where: str, labels: Mapping[int, LabelT]
    ) -> Iterator[tuple[int, LabelT, dict[str, Any]]]:
        """Yield id, class and entry of every segment. Callers keep the last entry of an id, as panopticapi does."""
        listed = require_field(annotation, "segments_info", where)
        if not isinstance(listed, list):
            raise EvaluationError(f"{where}: segments_info is {repr(listed)[:40]}; it must be a list of segments")
        for entry in listed:
            require_field(entry, "id", where)
            segment_id, category = read_int(entry, "id", where), require_field(entry, "category_id", where)
            if not isinstance(category, Hashable) or category not in labels:
                raise EvaluationError(
                    f"{where}: segment {segment_id} has category {category!r:.40}, which {self.files.truth} "
                    "does not list"
                )
            yield segment_id, labels[category], entry


@dataclass(frozen=True)
class _ScoreDetails:
    """Does the work of `_ScoreImage`, with errors and confusion."""

    image: _ScoreImage

    def __call__(self, task: _Pair) -> MultiRecord[PanopticRecord]:
        record = self.image(task)
        annotation, predicted = task
        where = f"image {annotation['image_id']}"
        candidates = panoptic_candidates(self.image._truth(annotation, where), self.image._prediction(predicted, where))
        outcomes, errors = assign_outcomes(candidates), panoptic_errors(candidates)
        return MultiRecord(record, {"segments": outcomes, "errors": errors})


def _truth_segment(entry: dict[str, Any], label: int, where: str) -> TruthSegment:
    """Return the segment. Raises EvaluationError for an invalid entry, and for an area of 0 unless it is a crowd."""
    area, is_crowd = read_area(entry, where), read_flag(entry, "iscrowd", where)
    if area == 0 and not is_crowd:
        raise EvaluationError(f"{where}: area is 0; it must be the segment's number of pixels")
    return TruthSegment(label, area, is_crowd)


def _report(
    categories: tuple[ScoredCategory, ...], num_images: int, name: str, notes: Sequence[str], quality: PanopticQuality
) -> ScoreReport:
    splits: dict[str, Quality | None] = {"all": quality.all, "things": quality.things, "stuff": quality.stuff}
    per_class = dict(zip(categories, quality.per_class, strict=True))
    content: dict[str, Any] = {
        split: {"pq": q.pq, "sq": q.sq, "rq": q.rq, "n": q.num_classes} if q is not None else None
        for split, q in splits.items()
    }
    content["per_class"] = {
        str(category.id): {"pq": q.pq, "sq": q.sq, "rq": q.rq, "iou": q.iou}
        | {"tp": q.true_positives, "fp": q.false_positives, "fn": q.false_negatives}
        for category, q in per_class.items()
    }
    content["by_size"] = {
        size: {"pq": q.pq, "sq": q.sq, "rq": q.rq, "n": q.num_classes} if q is not None else None
        for size, q in quality.by_size.items()
    }
    rows = [
        [split, *_percents(q), q.num_classes if q is not None else 0]
        for split, q in {**splits, **quality.by_size}.items()
    ]
    class_rows = [
        [category.name, "thing" if category.is_thing else "stuff", *_percents(q), *counts]
        for category, q in per_class.items()
        if any(counts := (q.true_positives, q.false_positives, q.false_negatives))
    ]
    names = [name, "SQ", "RQ"]
    tables = [
        columns(["", *names, "classes"], rows),
        columns(["class", "kind", *names, "TP", "FP", "FN"], class_rows),
    ]
    notes = _with_doubts(notes, categories, quality)
    return score_report(content, f"{num_images} images, in per cent", num_images, notes, tables)


def _with_doubts(
    notes: Sequence[str], categories: Sequence[ScoredCategory | Category], quality: PanopticQuality
) -> list[str]:
    return [*notes, *describe_high_quality([category.name for category in categories], quality.per_class)]


def _percents(quality: Quality | ClassQuality | None) -> tuple[float | None, ...]:
    return (None,) * 3 if quality is None else (100 * quality.pq, 100 * quality.sq, 100 * quality.rq)
