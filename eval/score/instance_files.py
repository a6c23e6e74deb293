"""Annotations and results of COCO's instance files, image by image, checked before anything computes with them.

What the tools that match masks would believe unread is refused here: sizes, flags, areas, scores, classes and masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f.data_pipeline.readers.masks import read_rles
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.average_precision import InstanceDetections, InstanceTruth
from m2f.eval.score.files import MAX_PIXELS, area_of, flag, require, some, whole

Entry = dict[str, Any]


@dataclass(frozen=True)
class ImageEntries:
    """The entries of one image, as the files have them."""

    id: int | str
    height: int
    width: int
    annotations: list[Entry]
    results: list[Entry]
    result_numbers: list[int]
    """Positions of the results in their file."""


@dataclass(frozen=True)
class InstanceFiles:
    """Where entries are from, for messages."""

    truth: Path
    predictions: Path

    def annotation(self, image: ImageEntries, position: int) -> str:
        """Name of an annotation."""
        entry = image.annotations[position]
        own = entry.get("id", f"number {position}") if isinstance(entry, dict) else f"number {position}"
        return f"{self.truth}: image {image.id}: annotation {str(own)[:40]}"

    def result(self, image: ImageEntries, position: int) -> str:
        """Name of a result."""
        return f"{self.predictions}: image {image.id}: result {image.result_numbers[position]}"


def read_entries(document: Mapping[str, Any], results: Any, files: InstanceFiles) -> list[ImageEntries]:
    """Every image in ascending id, with its annotations and results in the order of their files.

    Annotations of images that are not listed are left out. Raises EvaluationError for images that cannot be told apart
    or have no usable size, and for results of images that are not listed.
    """
    truth, predictions = files.truth, files.predictions
    if not isinstance(results, list):
        raise EvaluationError(
            f"{predictions} is no list of results, each with image_id, category_id, segmentation and score; "
            "an object with `annotations` is for `m2f score panoptic`"
        )
    if any("segments_info" in entry for entry in document["annotations"][:1] if isinstance(entry, dict)):
        raise EvaluationError(f"{truth} has panoptic annotations; give those of instances, as instances_val2017.json")
    images = _listed_images(document["images"], truth)
    for position, entry in enumerate(document["annotations"]):  # subsets are made by shortening `images`
        image_id = require(entry, "image_id", f"{truth}: an annotation")
        if not isinstance(image_id, int | float | str):
            raise EvaluationError(f"{truth}: image_id of annotation number {position} is {str(image_id)[:40]}, no id")
        if (image := images.get(image_id)) is not None:
            image.annotations.append(entry)
    for number, entry in enumerate(results):
        image_id = require(entry, "image_id", f"{predictions}: result {number}")
        image = images.get(image_id) if isinstance(image_id, int | float | str) else None
        if image is None:
            raise EvaluationError(
                f"{predictions}: result {number} is of image {repr(image_id)[:40]}, which {truth} does not list; "
                "score the results of the same images, with the same ids"
            )
        image.results.append(entry)
        image.result_numbers.append(number)
    return list(images.values())


def _listed_images(listed: Sequence[Any], truth: Path) -> dict[Any, ImageEntries]:
    """The images without entries, by id, ascending."""
    found: dict[Any, ImageEntries] = {}
    for number, entry in enumerate(listed):
        image_id = require(entry, "id", f"{truth}: images[{number}]")
        if type(image_id) not in (int, str):
            raise EvaluationError(f"{truth}: images[{number}] has the id {str(image_id)[:40]}; ids are numbers or text")
        where = f"{truth}: image {image_id}"
        if image_id in found:
            raise EvaluationError(f"{where} is listed twice; every image needs an id of its own")
        height, width = (whole(entry, side, where) for side in ("height", "width"))
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            size = " x ".join(str(side) if side < 1e12 else "more than 1e12" for side in (width, height))
            raise EvaluationError(f"{where} has {size} pixels; sizes are from 1 pixel to {MAX_PIXELS} pixels in all")
        found[image_id] = ImageEntries(image_id, height, width, [], [], [])
    if len({type(image_id) for image_id in found}) > 1:
        raise EvaluationError(f"{truth}: some ids of images are numbers and some are text; use one kind")
    return {image_id: found[image_id] for image_id in sorted(found)}


def without_results(images: Sequence[ImageEntries], predictions: Path) -> str | None:
    """A line about the images that have no result, which is right where nothing was found; None if all have one."""
    missing = [image.id for image in images if not image.results]
    if not missing:
        return None
    return f"{len(missing)} of {len(images)} images have no result in {predictions}, and count as such: {some(missing)}"


def truth_of(image: ImageEntries, labels: Mapping[int, int], files: InstanceFiles) -> InstanceTruth:
    """The annotations of one image; `labels`: class by category id. Raises EvaluationError naming the annotation."""
    entries = image.annotations

    def name(position: int) -> str:
        return files.annotation(image, position)

    areas = np.array([area_of(entry, name(i)) for i, entry in enumerate(entries)], dtype=np.float64)
    crowds = np.array([flag(entry, "iscrowd", name(i)) for i, entry in enumerate(entries)], dtype=bool)
    return InstanceTruth(
        masks=_masks(image, entries, name), labels=_labels(entries, labels, files, name), areas=areas, is_crowd=crowds
    )


def detections_of(
    image: ImageEntries, labels: Mapping[int, int], dropped: frozenset[int], files: InstanceFiles
) -> InstanceDetections:
    """The results of one image but for those of the `dropped` categories; else as `truth_of`."""
    kept = range(len(image.results))
    if dropped:
        kept = [i for i, entry in enumerate(image.results) if entry.get("category_id") not in dropped]
    entries = [image.results[i] for i in kept]

    def name(position: int) -> str:
        return files.result(image, kept[position])

    return InstanceDetections(
        masks=_masks(image, entries, name),
        mask_index=np.arange(len(entries)),
        labels=_labels(entries, labels, files, name),
        scores=_scores(entries, name),
    )


def _scores(entries: Sequence[Entry], name: Callable[[int], str]) -> np.ndarray:
    """[D] float64, finite."""
    scores = [entry.get("score") for entry in entries]
    if set(map(type, scores)) <= {float}:
        found = np.array(scores, dtype=np.float64)
        if np.isfinite(found).all():
            return found
    for position, entry in enumerate(entries):
        score = require(entry, "score", name(position))
        if not isinstance(score, int | float) or not _is_finite(score):
            raise EvaluationError(f"{name(position)} has the score {repr(score)[:40]}, which is no number")
    return np.array(scores, dtype=np.float64)


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # whole numbers of JSON can have thousands of digits
        return False


def _labels(
    entries: Sequence[Entry], labels: Mapping[int, int], files: InstanceFiles, name: Callable[[int], str]
) -> np.ndarray:
    """[N] int64 classes."""
    try:
        return np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64)
    except (KeyError, TypeError):
        for position, entry in enumerate(entries):
            category = require(entry, "category_id", name(position))
            if not isinstance(category, int | float | str) or category not in labels:
                raise EvaluationError(
                    f"{name(position)} has the category {str(category)[:40]}, which {files.truth} does not list"
                ) from None
        raise


def _masks(image: ImageEntries, entries: Sequence[Entry], name: Callable[[int], str]) -> tuple[Any, ...]:
    try:
        segmentations = [entry["segmentation"] for entry in entries]
    except KeyError:
        position = next(i for i, entry in enumerate(entries) if "segmentation" not in entry)
        what = " is a box without `segmentation`; masks are scored" if "bbox" in entries[position] else ""
        raise EvaluationError(name(position) + (what or " has no `segmentation`")) from None
    return read_rles(segmentations, image.height, image.width, name)
