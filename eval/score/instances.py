"""Mask AP of COCO results, with the rules and the numbers of pycocotools and boundary-iou-api.

Three things do not depend on the file here: the size of a detection is that of its mask, also where the results carry
boxes (pycocotools would take the box's area), annotations with id 0 can be matched, and annotations that share an id
count one by one (pycocotools keeps the last of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m2f.eval.metrics.average_precision import (
    AveragePrecision,
    AveragePrecisionState,
    DetectionRecord,
    class_agnostic_detections,
    class_agnostic_truth,
    match_instances,
)
from m2f.eval.metrics.boundary import BOUNDARY_RATIO
from m2f.eval.results.results import columns
from m2f.eval.score.files import (
    ScoredCategory,
    match_predictions,
    read_categories,
    read_document,
    read_json,
)
from m2f.eval.score.instance_files import (
    ImageEntries,
    InstanceFiles,
    detections_of,
    read_entries,
    truth_of,
    without_results,
)
from m2f.eval.score.scoring import ScoreReport, Scoring, percent

MAX_DETS = (1, 10, 100)
CLASS_AGNOSTIC_MAX_DETS = (1, 10, 100, 1000)


def instance_scoring(
    truth: Path, predictions: Path, *, boundary: bool, class_agnostic: bool
) -> Scoring[ImageEntries, DetectionRecord, AveragePrecision]:
    """The 12 numbers of COCO over the images of the truth; `class_agnostic`: as if there were one class, and AR1000.

    Raises EvaluationError for JSON files that are unusable and for results of unknown images.
    """
    document = read_document(truth, "images", "annotations", "categories")
    categories = tuple(sorted(read_categories(document, truth), key=lambda c: c.id))
    labels = {c.id: label for label, c in enumerate(categories)}
    results = read_json(predictions)
    matched = match_predictions(results, predictions, categories, truth, kinds=False)
    files = InstanceFiles(truth, predictions)
    images = read_entries(document, results, files)
    limits = CLASS_AGNOSTIC_MAX_DETS if class_agnostic else MAX_DETS
    ratio = BOUNDARY_RATIO if boundary else None
    names = ["Boundary" * boundary, "class-agnostic" * class_agnostic, "mask AP"]
    title = f"{' '.join(filter(None, names))}, {len(images)} images, in per cent"
    title = "\n".join(filter(None, [title, matched.note, without_results(images, predictions)]))
    return Scoring(
        jobs=images,
        work=_ScoreImage(files, labels, matched.labels(labels), matched.dropped, class_agnostic, limits[-1], ratio),
        state=AveragePrecisionState(1 if class_agnostic else len(categories), limits, ratio),
        report=partial(_report, () if class_agnostic else categories, title),
    )


@dataclass(frozen=True)
class _ScoreImage:
    files: InstanceFiles
    labels: Mapping[int, int]
    """Category id of the truth -> class."""
    predicted_labels: Mapping[int, int]
    """Category id of the predictions -> class."""
    dropped: frozenset[int]
    """Category ids of the predictions that are not scored."""
    class_agnostic: bool
    limit: int
    boundary_ratio: float | None

    def __call__(self, image: ImageEntries) -> DetectionRecord:
        truth = truth_of(image, self.labels, self.files)
        detections = detections_of(image, self.predicted_labels, self.dropped, self.files)
        if self.class_agnostic:
            truth, detections = class_agnostic_truth(truth), class_agnostic_detections(detections)
        return match_instances(truth, detections, self.limit, self.boundary_ratio)


def _report(categories: tuple[ScoredCategory, ...], title: str, result: AveragePrecision) -> ScoreReport:
    numbers = result.stats_at(MAX_DETS[-1])
    per_class = dict(zip(categories, result.per_class, strict=True)) if categories else {}
    content = {**numbers, "per_class": {str(c.id): ap for c, ap in per_class.items()}}
    tables = [title, columns(list(numbers), [[percent(value) for value in numbers.values()]])]
    if per_class:
        tables.append(columns(["class", "AP"], [[c.name, percent(ap)] for c, ap in per_class.items() if ap >= 0]))
    return ScoreReport(content, "\n\n".join(tables))
