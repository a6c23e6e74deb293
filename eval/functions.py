"""Metrics for Python programs: `evaluate_panoptic`, `evaluate_instances` and `evaluate_semantic`.

Each function takes arrays, image by image, or paths of files as `m2f score` does. An array may also be a tensor on any
device or a list. `EvaluationResults` has `metrics()` and `per_class()` in per cent, `table()` as text, and exact shares
in `panoptic`, `instance` and `semantic`. Doubts about the truth, such as wrong areas, are reported as warnings.

    from m2f.eval.functions import PanopticImage, evaluate_panoptic

    truth = [PanopticImage(id_map, {1: 0, 2: 1})]          # [H, W] int, 0 is void; segment id -> class
    found = [PanopticImage(predicted_map, {7: 0, 9: 1})]
    results = evaluate_panoptic(truth, found, class_names=["cat", "sky"], is_thing=[True, False])
    results.metrics()["PQ"]
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable, Task
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.masks import checked_areas, compressed_texts
from m2f.eval.arrays import (
    Instances,
    MapLike,
    PanopticImage,
    checked_instances,
    checked_panoptic,
    compressed_rle,
    to_array,
)
from m2f.eval.config import ExtraMetric
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.error_types import instance_errors, panoptic_errors
from m2f.eval.metrics.extra.task_metric import ScoredImage
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.metrics.mean_iou import BINARY_MASK, MeanIoUState, ignore_label, is_binary_mask
from m2f.eval.metrics.overlaps import count_overlaps
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment
from m2f.eval.metrics.rle import Rle, encode_masks, mask_areas
from m2f.eval.metrics.segment_errors import instance_candidates, panoptic_candidates
from m2f.eval.results.results import EvaluationResults, EvaluationSubject
from m2f.eval.results.states import EvaluationStates
from m2f.eval.score.instances import instance_scoring
from m2f.eval.score.panoptic import PanopticFiles, panoptic_scoring
from m2f.eval.score.semantic import semantic_scoring
from m2f.eval.score.truth_doubts import TruthDoubts, describe_high_quality, instance_doubts, panoptic_doubts
from m2f.model.errors import UserError

PathLike = str | os.PathLike[str]
_ImageT = TypeVar("_ImageT")


def evaluate_panoptic(
    truth: Iterable[PanopticImage] | PathLike,
    predictions: Iterable[PanopticImage] | PathLike,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    is_thing: Sequence[bool] | Mapping[int, bool] | None = None,
    truth_masks: PathLike | None = None,
    prediction_masks: PathLike | None = None,
) -> EvaluationResults:
    """Compute PQ of a set of images. The result equals that of panopticapi.

    Args:
        truth: annotated images, or the path of a COCO panoptic JSON file.
        predictions: predicted images in the same order, or the path of a JSON file.
        class_names: name of every class, by class index; for images only.
        is_thing: whether each class is a thing, by class index; for images only. Both may be lists or mappings.
        truth_masks: folder of the annotated maps; for paths only.
        prediction_masks: folder of the predicted maps; for paths only.

    Raises:
        EvaluationError: inputs do not match each other. The message names the image or file.
    """
    if isinstance(truth, str | os.PathLike) or isinstance(predictions, str | os.PathLike):
        if truth_masks is None or prediction_masks is None:
            raise EvaluationError("evaluate_panoptic: paths require truth_masks and prediction_masks, folders of maps")
        files = PanopticFiles(
            truth=_path("truth", truth),
            truth_masks=Path(truth_masks),
            predictions=_path("predictions", predictions),
            prediction_masks=Path(prediction_masks),
        )
        return panoptic_scoring(files, boundary=False, detailed=True).compute_results()
    if class_names is None or is_thing is None:
        raise EvaluationError("evaluate_panoptic: images require class_names and is_thing, with one entry per class")
    states, table = _states(class_names, is_thing, "panoptic")
    assert states.panoptic is not None
    assert states.segments is not None
    assert states.errors is not None
    doubts = TruthDoubts()
    for number, (annotated, predicted) in enumerate(_pairs(truth, predictions)):
        annotated = checked_panoptic(annotated, f"image {number}: the truth")
        predicted = checked_panoptic(predicted, f"image {number}: the prediction")
        _check_labels(number, (*annotated.labels.values(), *predicted.labels.values()), len(table.categories))
        image_truth = _panoptic_truth(annotated)
        image_prediction = PanopticPrediction(predicted.id_map, predicted.labels)
        states.panoptic.update(number, image_truth, image_prediction)
        candidates = panoptic_candidates(image_truth, image_prediction)
        states.segments.update(number, candidates)
        states.errors.add(number, panoptic_errors(candidates))
        doubts += panoptic_doubts(image_truth)
    results = states.compute(table, SUBJECT)
    assert results.panoptic is not None
    names = [category.name for category in table.categories]
    _warn(doubts.describe("PQ uses the stated areas") + describe_high_quality(names, results.panoptic.per_class))
    return results


def evaluate_instances(
    truth: Iterable[Instances] | PathLike,
    predictions: Iterable[Instances] | PathLike,
    *,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    boxes: bool = False,
) -> EvaluationResults:
    """Compute mask AP of a set of images. The result equals that of pycocotools.

    Args:
        truth: annotated images, or the path of a COCO instances JSON file.
        predictions: detections in the same order, or the path of a JSON file of COCO results.
        class_names: name of every class, by class index; for images only.
        boxes: also compute the AP of boxes, as `box_AP`.

    Raises:
        EvaluationError: inputs do not match each other. The message names the image or file.
    """
    if isinstance(truth, str | os.PathLike) or isinstance(predictions, str | os.PathLike):
        paths = _path("truth", truth), _path("predictions", predictions)
        return instance_scoring(
            *paths, boundary=False, class_agnostic=False, boxes=boxes, detailed=True
        ).compute_results()
    if class_names is None:
        raise EvaluationError("evaluate_instances: images require class_names, with one entry per class")
    names = class_list(class_names)
    states, table = _states(names, [True] * len(names), "instance", ["box"] if boxes else [])
    assert states.instance is not None
    assert states.segments is not None
    assert states.errors is not None
    doubts = TruthDoubts()
    for number, (annotated, detected) in enumerate(_pairs(truth, predictions)):
        image_truth, detections = _instance_truth(number, annotated), _detections(number, detected)
        states.instance.update(number, image_truth, detections)
        states.segments.update(number, instance_candidates(image_truth, detections))
        states.errors.add(number, instance_errors(image_truth, detections))
        image = ScoredImage(image_id=number, truth=image_truth, prediction=detections, classes=table.categories)
        states.update_extra("instance", image)
        doubts += instance_doubts(image_truth)
    _warn(doubts.describe("AP by size uses the stated areas"))
    return states.compute(table, SUBJECT)


def evaluate_semantic(
    truth: Iterable[MapLike] | PathLike,
    predictions: Iterable[MapLike] | PathLike,
    *,
    class_names: Sequence[str] | Mapping[int, str],
    ignore: int | None = None,
    void: int | None = None,
) -> EvaluationResults:
    """Compute mIoU and accuracies of a set of images. The results equal those of detectron2.

    Args:
        truth: annotated label maps [H, W] of integers, or the path of a folder of PNG files.
        predictions: predicted label maps in the same order, or the path of a folder of files with the same names.
        class_names: name of every class; the label of a class is its position.
        ignore: label of truth pixels that are left out. None: 255, or 65535 for 256 or more classes.
        void: label of predicted pixels without a class, with the same default. Each counts as a miss of the truth's
            class.

    Raises:
        EvaluationError: inputs do not match each other. The message names the image or file.
    """
    names = class_list(class_names)
    if isinstance(truth, str | os.PathLike) or isinstance(predictions, str | os.PathLike):
        paths = _path("truth", truth), _path("predictions", predictions)
        return semantic_scoring(
            *paths, num_classes=len(names), ignore=ignore, void=void, class_names=names
        ).compute_results()
    table = _table(names, [False] * len(names))
    values: set[int] = set()
    states = EvaluationStates(
        semantic=MeanIoUState(len(names), ignore, ignore_label(len(names)) if void is None else void)
    )
    assert states.semantic is not None
    for number, (annotated, predicted) in enumerate(_pairs(truth, predictions)):
        annotated = to_array(annotated, f"image {number}: the truth")
        predicted = to_array(predicted, f"image {number}: the prediction")
        _check_maps(number, annotated, predicted)
        states.semantic.update(number, annotated, predicted)
        if values <= {0, 255}:  # once another value occurs, the truth is not binary, and the search ends
            values.update(np.unique(annotated).tolist())
    if is_binary_mask(values, ignore, len(names)):
        raise EvaluationError(f"the truth has {BINARY_MASK}")
    return states.compute(table, SUBJECT)


SUBJECT = EvaluationSubject(dataset="images", fingerprint="")


def class_list(names: Collection[str] | Mapping[int, str], error: type[UserError] = EvaluationError) -> tuple[str, ...]:
    """Return the class names by label, from a list of names or from names by label.

    Raises `error` for a single text, for labels that are not 0 to K - 1, and for empty names.
    """
    if isinstance(names, str | bytes | Set) or not (hasattr(names, "__len__") and hasattr(names, "__iter__")):
        raise error(f"the class names are {names!r:.50}; give a list with one name per class")
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise error(f"the class names have the labels {sorted(names, key=str)}; they must be 0 to K - 1")
        by_label: dict[Any, Any] = dict(names)
        names = [by_label[label] for label in range(len(by_label))]
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise error(f"the class names contain {wrong[0]!r}; each must be a text that is not empty")
    return tuple(map(str, names))


def thing_flags(
    is_thing: Sequence[bool] | Mapping[int, bool], num_classes: int, error: type[UserError] = EvaluationError
) -> tuple[bool, ...]:
    """Return whether each class is a thing, by label, from a list of flags or from flags by label.

    Raises `error` for labels that are not 0 to K - 1, for a wrong number of flags, and for values that are not flags.
    """
    if isinstance(is_thing, Mapping):
        if set(is_thing) != set(range(num_classes)):
            raise error(f"is_thing has the labels {sorted(is_thing, key=str)}; they must be 0 to {num_classes - 1}")
        is_thing = [is_thing[label] for label in range(num_classes)]
    values = None if isinstance(is_thing, str | bytes | Set) else to_array(is_thing, "is_thing").tolist()
    if not isinstance(values, list) or any(value not in (False, True) for value in values):
        raise error(f"is_thing is {is_thing!r:.50}; give a list with True or False for each class")
    if len(values) != num_classes:
        raise error(f"{num_classes} names and {len(values)} values of is_thing; give one of each per class")
    return tuple(map(bool, values))


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, stacklevel=3)


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise EvaluationError(
            f"{name} is {type(value).__name__}, but the other one is a path; pass two paths, or images on both sides"
        )
    return Path(value)


def _pairs(truth: Iterable[_ImageT], predictions: Iterable[_ImageT]) -> Iterable[tuple[_ImageT, _ImageT]]:
    """Yield pairs of images. Raises EvaluationError if a side is not a list, or if one has more images."""
    for side, images in (("truth", truth), ("predictions", predictions)):
        try:
            iter(images)
        except TypeError:
            raise EvaluationError(f"{side} is {images!r:.50}; give a list with one entry per image") from None
    missing = object()
    for number, (annotated, predicted) in enumerate(zip_longest(truth, predictions, fillvalue=missing)):
        if annotated is missing or predicted is missing:
            shorter = "truth" if annotated is missing else "predictions"
            raise EvaluationError(
                f"{shorter} has {number} images, fewer than the other side; pass the same images in the same order"
            )
        yield annotated, predicted  # type: ignore[misc]


def _table(
    class_names: Sequence[str] | Mapping[int, str], is_thing: Sequence[bool] | Mapping[int, bool]
) -> CategoryTable:
    names = class_list(class_names)
    pairs = zip(names, thing_flags(is_thing, len(names)), strict=True)
    return CategoryTable(tuple(Category(i, name, thing, (0, 0, 0)) for i, (name, thing) in enumerate(pairs)))


def _states(
    class_names: Sequence[str] | Mapping[int, str],
    is_thing: Sequence[bool] | Mapping[int, bool],
    task: Task,
    extra: Sequence[ExtraMetric] = (),
) -> tuple[EvaluationStates, CategoryTable]:
    table = _table(class_names, is_thing)
    return EvaluationStates.empty(table, [task], extra), table


def _check_labels(number: int, labels: Iterable[int], num_classes: int) -> None:
    invalid = [label for label in labels if not 0 <= label < num_classes]
    if invalid:
        raise EvaluationError(f"image {number}: a segment has class {invalid[0]}, outside 0..{num_classes - 1}")


def _check_maps(number: int, truth: np.ndarray, predicted: np.ndarray) -> None:
    for side, values in (("truth", truth), ("prediction", predicted)):
        if values.dtype.kind not in "iub":
            raise EvaluationError(f"image {number}: the {side} is a {values.dtype} map; it must be integers [H, W]")


def _panoptic_truth(image: PanopticImage) -> PanopticTruth:
    counted = count_overlaps(image.id_map, image.id_map).truth_area
    segments = {
        i: TruthSegment(label, float(image.areas.get(i, counted.get(i, 0))), i in image.crowds)
        for i, label in image.labels.items()
    }
    return PanopticTruth(image.id_map, segments)


def _instance_truth(number: int, given: Instances) -> InstanceTruth:
    image = checked_instances(given, f"image {number}: the truth")
    masks = _masks(number, image)
    areas = mask_areas(masks) if image.areas is None else np.asarray(image.areas)
    crowd = np.zeros(len(masks), bool) if image.is_crowd is None else np.asarray(image.is_crowd)
    return InstanceTruth(masks, np.asarray(image.labels), areas, crowd)


def _detections(number: int, given: Instances) -> InstanceDetections:
    image = checked_instances(given, f"image {number}: the prediction")
    if image.scores is None:
        raise EvaluationError(f"image {number}: the detections have no scores")
    masks = _masks(number, image)
    return InstanceDetections(masks, np.arange(len(masks)), np.asarray(image.labels), np.asarray(image.scores))


def _masks(number: int, image: Instances) -> tuple[Rle, ...]:
    """Return run-length masks. Raises EvaluationError for masks of another form."""
    valid = _valid_texts(image.masks)
    masks: list[Rle] = list(valid or ())
    for position, mask in enumerate(image.masks if valid is None else ()):
        where = f"image {number}: mask {position}"
        if not isinstance(mask, np.ndarray):
            try:
                masks.append(compressed_rle(mask, where))
            except DataError as error:
                raise EvaluationError(str(error)) from error
        elif mask.ndim != 2 or mask.dtype != bool or not mask.size:
            raise EvaluationError(
                f"{where} is {mask.dtype} with shape {list(mask.shape)}; it must be bool [H, W], with pixels"
            )
        else:
            masks.extend(encode_masks([mask]))
    return tuple(masks)


def _valid_texts(masks: np.ndarray | Sequence[np.ndarray] | Sequence[Rle]) -> tuple[Rle, ...] | None:
    """Return the masks if all of them are valid compressed run lengths of one size, else None.

    Checking all masks at once takes about a fifth of the time of calling `compressed_rle` for each mask.
    """
    decoded = [
        {"size": mask.get("size"), "counts": counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts}
        for mask in masks
        if isinstance(mask, Mapping) and (counts := mask.get("counts")) is not None and type(mask.get("size")) is list
    ]
    match decoded:
        case [{"size": [int(height), int(width)]}, *_] if len(decoded) == len(masks) and min(height, width) > 0:
            texts = compressed_texts(decoded, height, width)
            return tuple(decoded) if texts is not None and checked_areas(texts, height, width) is not None else None
    return None
