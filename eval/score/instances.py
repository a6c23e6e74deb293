"""Mask AP of COCO results, with the rules and the numbers of pycocotools and boundary-iou-api.

Three things do not depend on the file here: the size of a detection is that of its mask, also where the results carry
boxes (pycocotools would take the box's area), annotations with id 0 can be matched, and annotations that share an id
count one by one (pycocotools keeps the last of them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m2f.data_pipeline.readers.masks import read_rle
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import (
    AveragePrecision,
    AveragePrecisionState,
    DetectionRecord,
    InstanceDetections,
    InstanceTruth,
    class_agnostic_detections,
    class_agnostic_truth,
    match_instances,
)
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.results.results import columns
from m2f.eval.score.files import (
    ScoredCategory,
    area_of,
    flag,
    match_predictions,
    read_categories,
    read_document,
    read_json,
    require,
    whole,
)
from m2f.eval.score.scoring import ScoreReport, Scoring, percent

MAX_DETS = (1, 10, 100)
CLASS_AGNOSTIC_MAX_DETS = (1, 10, 100, 1000)


@dataclass(frozen=True)
class _Image:
    """What the worker needs of one image."""

    id: int | str
    height: int
    width: int
    annotations: list[dict[str, Any]]
    results: list[dict[str, Any]]


def instance_scoring(
    truth: Path, predictions: Path, *, boundary: bool, class_agnostic: bool
) -> Scoring[_Image, DetectionRecord, AveragePrecision]:
    """The 12 numbers of COCO over the images of the truth; `class_agnostic`: as if there were one class, and AR1000.

    Raises EvaluationError for JSON files that are unusable and for results of unknown images.
    """
    document = read_document(truth, "images", "annotations", "categories")
    categories = tuple(sorted(read_categories(document, truth), key=lambda c: c.id))
    labels = {c.id: label for label, c in enumerate(categories)}
    results = read_json(predictions)
    matched = match_predictions(results, predictions, categories, truth, kinds=False)
    images = _images(document, results, truth, predictions)
    limits = CLASS_AGNOSTIC_MAX_DETS if class_agnostic else MAX_DETS
    ratio = BOUNDARY_RATIO if boundary else None
    names = ["Boundary" * boundary, "class-agnostic" * class_agnostic, "mask AP"]
    title = f"{' '.join(filter(None, names))}, {len(images)} images, in per cent"
    title += f"\n{matched.note}" if matched.note else ""
    return Scoring(
        jobs=images,
        work=_ScoreImage(
            truth, predictions, labels, matched.labels(labels), matched.dropped, class_agnostic, limits[-1], ratio
        ),
        state=AveragePrecisionState(1 if class_agnostic else len(categories), limits, ratio),
        report=partial(_report, () if class_agnostic else categories, title),
    )


def _images(document: Mapping[str, Any], results: Any, truth: Path, predictions: Path) -> list[_Image]:
    """Every image in ascending id, with its annotations and results in the order of their files."""
    if not isinstance(results, list):
        raise EvaluationError(
            f"{predictions} is no list of results, each with image_id, category_id, segmentation and score; "
            "an object with `annotations` is for `m2f score panoptic`"
        )
    if any("segments_info" in entry for entry in document["annotations"][:1] if isinstance(entry, dict)):
        raise EvaluationError(f"{truth} has panoptic annotations; give those of instances, as instances_val2017.json")
    try:
        listed = sorted(document["images"], key=lambda image: image["id"])
        where = f"{truth}: image {{}}"
        images = {
            e["id"]: _Image(
                e["id"], whole(e, "height", where.format(e["id"])), whole(e, "width", where.format(e["id"])), [], []
            )
            for e in listed
        }
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{truth}: an image lacks its id, height or width ({error!r})") from error
    for entry in document["annotations"]:  # of other images none: subsets are made by shortening `images`
        if (image := images.get(require(entry, "image_id", f"{truth}: an annotation"))) is not None:
            image.annotations.append(entry)
    for number, entry in enumerate(results):
        image = images.get(require(entry, "image_id", f"{predictions}: result {number}"))
        if image is None:
            raise EvaluationError(
                f"{predictions}: result {number} is of image {entry['image_id']!r}, which {truth} does not list; "
                "score the results of the same images, with the same ids"
            )
        if "segmentation" not in entry and "bbox" in entry:
            raise EvaluationError(f"{predictions}: result {number} is a box without `segmentation`; masks are scored")
        image.results.append(entry)
    return list(images.values())


@dataclass(frozen=True)
class _ScoreImage:
    truth: Path
    predictions: Path
    labels: Mapping[int, int]
    """Category id of the truth -> class."""
    predicted_labels: Mapping[int, int]
    """Category id of the predictions -> class."""
    dropped: frozenset[int]
    """Category ids of the predictions that are not scored."""
    class_agnostic: bool
    limit: int
    boundary_ratio: float | None

    def __call__(self, image: _Image) -> DetectionRecord:
        try:
            truth, detections = self._truth(image), self._detections(image)
        except TypeError as error:  # null, a list or a word where a number should be
            raise EvaluationError(
                f"image {image.id}: an entry in {self.truth} or {self.predictions} has a field of the wrong type "
                f"({error})"
            ) from error
        if self.class_agnostic:
            truth, detections = class_agnostic_truth(truth), class_agnostic_detections(detections)
        return match_instances(truth, detections, self.limit, self.boundary_ratio)

    def _truth(self, image: _Image) -> InstanceTruth:
        where = f"{self.truth}: image {image.id}"
        entries = image.annotations
        return InstanceTruth(
            masks=self._masks(image, entries, where),
            labels=self._labels(entries, where, self.labels),
            areas=np.array([area_of(e, f"{where}: annotation {e.get('id')}") for e in entries], dtype=np.float64),
            is_crowd=np.array([flag(e, "iscrowd", f"{where}: annotation {e.get('id')}") for e in entries], dtype=bool),
        )

    def _detections(self, image: _Image) -> InstanceDetections:
        where = f"{self.predictions}: image {image.id}"
        entries = [e for e in image.results if e.get("category_id") not in self.dropped]
        scores = [require(e, "score", where) for e in entries]
        for score in scores:
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise EvaluationError(f"{where} has the score {score!r}, which is no number")
        return InstanceDetections(
            masks=self._masks(image, entries, where),
            mask_index=np.arange(len(entries)),
            labels=self._labels(entries, where, self.predicted_labels),
            scores=np.array(scores, dtype=np.float64),
        )

    def _labels(self, entries: list[dict[str, Any]], where: str, labels: Mapping[int, int]) -> np.ndarray:
        ids = [require(e, "category_id", where) for e in entries]
        for category in ids:
            if category not in labels:
                raise EvaluationError(f"{where} has the category {category}, which {self.truth} does not list")
        return np.array([labels[category] for category in ids], dtype=np.int64)

    def _masks(self, image: _Image, entries: list[dict[str, Any]], where: str) -> tuple[Any, ...]:
        name = f"{where}, number {{}}"
        return tuple(
            read_rle(require(e, "segmentation", where), image.height, image.width, name.format(i))
            for i, e in enumerate(entries)
        )


def _report(categories: tuple[ScoredCategory, ...], title: str, result: AveragePrecision) -> ScoreReport:
    numbers = result.stats_at(MAX_DETS[-1])
    per_class = dict(zip(categories, result.per_class, strict=True)) if categories else {}
    content = {**numbers, "per_class": {str(c.id): ap for c, ap in per_class.items()}}
    tables = [title, columns(list(numbers), [[percent(value) for value in numbers.values()]])]
    if per_class:
        tables.append(columns(["class", "AP"], [[c.name, percent(ap)] for c, ap in per_class.items() if ap >= 0]))
    return ScoreReport(content, "\n\n".join(tables))
