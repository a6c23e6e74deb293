"""Annotations and results of COCO's instance files by image, validated before use.

Sizes, flags, areas, scores, classes and masks are validated, because the libraries that match masks do not check them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2f.data_pipeline.readers.coco_json import MAX_AREA
from m2f.data_pipeline.readers.masks import checked_areas, compressed_texts, read_rle
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.instance_matching import InstanceDetections, InstanceTruth
from m2f.eval.metrics.rle import TextMasks
from m2f.eval.score.files import (
    MAX_PIXELS,
    first_few,
    parse_file,
    read_area,
    read_bytes,
    read_flag,
    read_int,
    require_field,
    require_new_image,
)
from m2f.eval.score.plain_results import PlainResult, as_entry, read_plain_results

Entry = dict[str, Any]
Result = Entry | PlainResult
"""A result as read from its file. All results of a file have the same type."""


@dataclass(frozen=True)
class ImageEntries:
    """Entries of one image, as read from the files."""

    id: int | str
    height: int
    width: int
    annotations: list[Entry]
    results: list[Result]
    result_numbers: list[int]
    """Positions of the results in their file."""


@dataclass(frozen=True)
class InstanceFiles:
    """Paths of the files that contain the entries, for messages."""

    truth: Path
    predictions: Path

    def describe_annotation(self, image: ImageEntries, position: int) -> str:
        """Return the file, image and id of an annotation, for messages."""
        entry = image.annotations[position]
        name = entry.get("id", f"number {position}") if isinstance(entry, dict) else f"number {position}"
        return f"{self.truth}: image {image.id}: annotation {str(name)[:40]}"

    def describe_result(self, image: ImageEntries, position: int) -> str:
        """Return the file, image and position of a result, for messages."""
        return f"{self.predictions}: image {image.id}: result {image.result_numbers[position]}"


def read_entries(document: Mapping[str, Any], results: Any, files: InstanceFiles) -> list[ImageEntries]:
    """Return every image in ascending id, with its annotations and results in the order of their files.

    Annotations of unlisted images are left out. Raises EvaluationError for images with invalid or repeated ids or with
    unusable sizes. Also raises it for annotations whose image id has another type than the ids of images, and for
    results of unlisted images.
    """
    truth, predictions = files.truth, files.predictions
    if not isinstance(results, list):
        raise EvaluationError(
            f"{predictions} is not a list of results with image_id, category_id, segmentation and score; "
            "for an object with `annotations`, use `m2f score panoptic`"
        )
    if any("segments_info" in entry for entry in document["annotations"][:1] if isinstance(entry, dict)):
        raise EvaluationError(f"{truth} has panoptic annotations; use instances, such as instances_val2017.json")
    images = _listed_images(document["images"], truth)
    where = f"{truth}: an annotation"
    has_text_ids = any(isinstance(image_id, str) for image_id in images)
    # Subsets of a data set often list fewer images, but keep the annotations of all.
    for position, entry in enumerate(document["annotations"]):
        image_id = require_field(entry, "image_id", where)
        if not isinstance(image_id, int | float | str):
            raise EvaluationError(
                f"{truth}: image_id of annotation number {position} is {str(image_id)[:40]}, not an id"
            )
        if (image := images.get(image_id)) is not None:
            image.annotations.append(entry)
        elif images and isinstance(image_id, str) != has_text_ids:
            raise EvaluationError(
                f"{truth}: image_id of annotation number {position} is {image_id!r:.40}, but the ids of images are "
                f"{'text' if has_text_ids else 'integers'}; use one type"
            )
    number = 0
    for image_id, group in itertools.groupby(results, _get_image_id):  # results of an image are mostly consecutive
        image = images.get(image_id) if isinstance(image_id, int | float | str) else None
        if image is None:
            if image_id is None:
                require_field(results[number], "image_id", f"{predictions}: result {number}")
            raise EvaluationError(
                f"{predictions}: result {number} is for image {repr(image_id)[:40]}, which {truth} does not list; "
                "results must use the image ids of the truth"
            )
        image.results.extend(group)
        image.result_numbers.extend(range(number, number := number + len(image.results) - len(image.result_numbers)))
    return list(images.values())


def _get_image_id(result: Any) -> Any:
    """Return the image id of a result; None if it has none."""
    if type(result) is PlainResult:
        return result.image_id
    return result.get("image_id") if isinstance(result, dict) else None


def read_results(predictions: Path, *, with_boxes: bool) -> Any:
    """Read a file of results. They are `PlainResult`s if boxes are not requested and all entries are plain."""
    data = read_bytes(predictions)
    plain = None if with_boxes else read_plain_results(data)
    return parse_file(data, predictions) if plain is None else plain


def _listed_images(listed: Sequence[Any], truth: Path) -> dict[Any, ImageEntries]:
    """Return the images without entries, by id in ascending order."""
    by_id: dict[Any, ImageEntries] = {}
    for number, entry in enumerate(listed):
        image_id = require_field(entry, "id", f"{truth}: images[{number}]")
        if type(image_id) not in (int, str):
            raise EvaluationError(f"{truth}: images[{number}] has id {str(image_id)[:40]}; ids are integers or text")
        where = f"{truth}: image {image_id}"
        require_new_image(image_id, by_id, where)
        height, width = (read_int(entry, side, where) for side in ("height", "width"))
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            size = " x ".join(str(side) if side < 1e12 else "more than 1e12" for side in (width, height))
            raise EvaluationError(f"{where} has {size} pixels; it must have from 1 to {MAX_PIXELS} pixels in total")
        by_id[image_id] = ImageEntries(image_id, height, width, [], [], [])
    if len({type(image_id) for image_id in by_id}) > 1:
        raise EvaluationError(f"{truth}: some image ids are integers and some are text; use one type")
    return {image_id: by_id[image_id] for image_id in sorted(by_id)}


def describe_missing_results(images: Sequence[ImageEntries], predictions: Path) -> str | None:
    """Return a line about images without results, which are valid if nothing was found; None if all have results."""
    missing = [image.id for image in images if not image.results]
    if not missing:
        return None
    return (
        f"{len(missing)} of {len(images)} images have no result in {predictions} (no detections): {first_few(missing)}"
    )


def describe_unlisted_images(images: Sequence[ImageEntries], annotations: int, truth: Path) -> str | None:
    """Return a line about annotations of unlisted images, or None. `annotations` is the total number of annotations."""
    unlisted = annotations - sum(len(image.annotations) for image in images)
    if not unlisted:
        return None
    return f"{unlisted} of {annotations} annotations are for images that {truth} does not list; they are not scored"


class MaskPixels(NamedTuple):
    """Numbers of pixels of one image's masks. None: not known, so the masks must be validated one by one."""

    annotations: np.ndarray | None
    """[G] int64, by annotation."""
    results: np.ndarray | None
    """[D] int64, by result."""


def mask_pixels(images: Sequence[ImageEntries]) -> list[MaskPixels]:
    """Count the pixels of the masks of every image. All masks of one size are read at once, which is faster.

    The counts are None if any mask of the same size is invalid. They are also None for annotations or results of which
    one mask is not stored as run-length text.
    """
    sides = [
        side
        for image in images
        for side in (_run_length_texts(image, image.annotations), _run_length_texts(image, image.results))
    ]
    sizes = [(image.height, image.width) for image in images for _ in range(2)]
    pixels: list[np.ndarray | None] = [None] * len(sides)
    for size in set(sizes):
        readable = [(i, side) for i, side in enumerate(sides) if side is not None and sizes[i] == size]
        areas = checked_areas([text for _, side in readable for text in side], *size)
        if areas is not None:
            ends = itertools.accumulate(len(side) for _, side in readable)
            for (i, side), end in zip(readable, ends, strict=True):
                pixels[i] = areas[end - len(side) : end]
    return [MaskPixels(*pixels[i : i + 2]) for i in range(0, len(pixels), 2)]


def _run_length_texts(image: ImageEntries, entries: Sequence[Result]) -> list[str] | None:
    """Return the run lengths of all masks as text; None if a mask has another form or size."""
    masks = [entry.segmentation for entry in entries if type(entry) is PlainResult]
    if len(masks) < len(entries):
        segmentations = [entry.get("segmentation") for entry in entries if isinstance(entry, dict)]
        return compressed_texts(segmentations, image.height, image.width)
    size = image.height, image.width
    texts = [mask.counts for mask in masks if mask.size == size]
    return texts if len(texts) == len(masks) else None


def read_truth(
    image: ImageEntries, labels: Mapping[int, int], files: InstanceFiles, pixels: np.ndarray | None = None
) -> InstanceTruth:
    """Return the annotations of one image. `labels` maps category ids to classes.

    `pixels` are the numbers of pixels of the masks if the masks are known to be valid; None: masks are validated here.
    Raises EvaluationError naming an invalid annotation.
    """
    entries = image.annotations

    def name(position: int) -> str:
        return files.describe_annotation(image, position)

    return InstanceTruth(
        masks=_masks(image, entries, name, pixels),
        labels=_labels(entries, labels, files, name),
        areas=_areas(entries, name),
        is_crowd=_crowds(entries, name),
        pixels=pixels,
    )


def _areas(entries: Sequence[Entry], name: Callable[[int], str]) -> np.ndarray:
    """Return the stated areas: [N] float64."""
    areas = [entry.get("area") for entry in entries]
    if set(map(type, areas)) <= {float, int}:
        values = np.array(areas)
        if values.dtype != object and (values >= 0).all() and (values <= MAX_AREA).all():
            return values.astype(np.float64)
    return np.array([read_area(entry, name(i)) for i, entry in enumerate(entries)], dtype=np.float64)


def _crowds(entries: Sequence[Entry], name: Callable[[int], str]) -> np.ndarray:
    """Return the crowd flags: [N] bool."""
    stated = [entry.get("iscrowd") for entry in entries]
    if set(map(type, stated)) <= {int, bool, type(None)} and {0, 1, None}.issuperset(stated):
        return np.array(stated, dtype=bool)
    return np.array([read_flag(entry, "iscrowd", name(i)) for i, entry in enumerate(entries)], dtype=bool)


def read_detections(
    image: ImageEntries,
    labels: Mapping[int, int],
    dropped: frozenset[int],
    files: InstanceFiles,
    pixels: np.ndarray | None = None,
) -> InstanceDetections:
    """Return the results of one image, without those of `dropped` categories; other arguments as in `read_truth`."""
    results, numbers = image.results, range(len(image.results))
    if dropped:
        numbers = [i for i in numbers if not _is_of(results[i], dropped)]
        results = [results[i] for i in numbers]
        pixels = None if pixels is None else pixels[numbers]
    plain = [result for result in results if type(result) is PlainResult]
    known = [labels[result.category_id] for result in plain if result.category_id in labels]
    scores = np.array([result.score for result in plain], dtype=np.float64)
    if pixels is not None and len(plain) == len(known) == len(results) and np.isfinite(scores).all():
        masks = TextMasks((image.height, image.width), [result.segmentation.counts for result in plain])
        return InstanceDetections(masks, np.arange(len(masks)), np.array(known, dtype=np.int64), scores, pixels)

    def name(position: int) -> str:
        return files.describe_result(image, numbers[position])

    entries = [result if isinstance(result, dict) else as_entry(result) for result in results]
    return InstanceDetections(
        masks=_masks(image, entries, name, pixels),
        mask_index=np.arange(len(entries)),
        labels=_labels(entries, labels, files, name),
        scores=_scores(entries, name),
        areas=pixels,
    )


def get_category_id(result: Result) -> Any:
    """Return the category id of a result as in its file; None if it has none."""
    return result.category_id if isinstance(result, PlainResult) else result.get("category_id")


def _is_of(result: Result, category_ids: frozenset[int]) -> bool:
    """Return whether a result is of one of these categories; False for an invalid id, which `_labels` reports."""
    category = get_category_id(result)
    return isinstance(category, Hashable) and category in category_ids


def _scores(entries: Sequence[Entry], name: Callable[[int], str]) -> np.ndarray:
    """Return the scores: [D] float64, all finite."""
    scores = [entry.get("score") for entry in entries]
    if set(map(type, scores)) <= {float}:
        values = np.array(scores, dtype=np.float64)
        if np.isfinite(values).all():
            return values
    for position, entry in enumerate(entries):
        score = require_field(entry, "score", name(position))
        if not isinstance(score, int | float) or not _is_finite(score):
            raise EvaluationError(f"{name(position)} has score {repr(score)[:40]}, which is not a finite number")
    return np.array(scores, dtype=np.float64)


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # integers in JSON can have thousands of digits
        return False


def _labels(
    entries: Sequence[Entry], labels: Mapping[int, int], files: InstanceFiles, name: Callable[[int], str]
) -> np.ndarray:
    """Return the classes: [N] int64."""
    try:
        return np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64)
    except (KeyError, TypeError):
        for position, entry in enumerate(entries):
            category = require_field(entry, "category_id", name(position))
            if not isinstance(category, int | float | str) or category not in labels:
                raise EvaluationError(
                    f"{name(position)} has category {category!r:.40}, which {files.truth} does not list"
                ) from None
        raise


def _masks(
    image: ImageEntries, entries: Sequence[Entry], name: Callable[[int], str], pixels: np.ndarray | None
) -> tuple[Any, ...]:
    """Return the masks, which are validated unless their `pixels` are known."""
    try:
        segmentations = [entry["segmentation"] for entry in entries]
    except KeyError:
        position = next(i for i, entry in enumerate(entries) if "segmentation" not in entry)
        problem = " has a box but no `segmentation`; scoring requires masks" if "bbox" in entries[position] else ""
        raise EvaluationError(name(position) + (problem or " has no `segmentation`")) from None
    if pixels is not None:
        return tuple(segmentations)
    return tuple(
        read_rle(segmentation, image.height, image.width, name(i)) for i, segmentation in enumerate(segmentations)
    )
