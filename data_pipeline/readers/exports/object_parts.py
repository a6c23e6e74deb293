"""Convert objects from labelling tools, drawn in one or several parts, into records of CocoInstancesReader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_json import CocoImage, require_unique
from m2f.data_pipeline.readers.files import unique_keys
from m2f.data_pipeline.readers.masks import read_rle
from m2f.data_pipeline.readers.unusable import UnusableAnnotation

INVALID_FIELD = "has an invalid field"
"""Start of messages about a field of a shape. Callers put the name of the shape before it."""
_MAX_PIXELS = 2**30
"""Limit of height x width. Masks are painted at the size in the annotation file, before the image file is checked."""


@dataclass(frozen=True, slots=True)
class ObjectPart:
    """A shape drawn by an annotator."""

    category_id: int
    shape: list[float] | dict[str, Any]
    """A ring x, y, x, y, ... in pixels, or an RLE with COCO's compressed run lengths."""
    group: str | None = None
    """Parts of an image with the same group and category form one object. A part without a group is an object."""


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image and its shapes, in the order of drawing: later shapes lie on top."""

    file_name: str
    """Path relative to the folder of images."""
    height: int
    width: int
    parts: tuple[ObjectPart, ...]


def categories_from_names(names: Sequence[str]) -> CategoryTable:
    """Return things with the given names and ids from 0. Raises DataError if there are none or names repeat."""
    if not names:
        raise DataError("the annotations contain no class; label at least one object, or list the classes")
    require_unique(names, "names of classes")
    return CategoryTable(tuple(Category(i, name, True, distinct_color(i)) for i, name in enumerate(names)))


def shapes_reader(
    images: Path,
    categories: CategoryTable,
    annotated: Sequence[AnnotatedImage],
    max_pixels: int,
    unusable: Sequence[UnusableAnnotation],
) -> CocoInstancesReader:
    """Return the reader of images with drawn objects.

    Raises:
        DataError: there is no image, or two images would have the same key.
    """
    if not annotated:
        raise DataError(f"{images} contains no annotated image; the data set is empty")
    unique_keys(image.file_name for image in annotated)
    records, count = [], 0
    for index, image in enumerate(annotated):
        entries = _merge_parts(image)
        numbered = [{**entry, "id": count + i} for i, entry in enumerate(entries, start=1)]
        count += len(entries)
        records.append((CocoImage(index, str(index), image.file_name, image.height, image.width), numbered))
    return CocoInstancesReader(images, categories, tuple(records), max_pixels, tuple(unusable))


def _merge_parts(image: AnnotatedImage) -> list[Mapping[str, Any]]:
    """Return one COCO annotation per object, ordered by the first part of each object."""
    objects: dict[tuple[int, str], list[ObjectPart]] = {}
    for number, part in enumerate(image.parts):
        name = f"alone {number}" if part.group is None else f"group {part.group}"
        objects.setdefault((part.category_id, name), []).append(part)
    return [
        {"category_id": category, "segmentation": _union([part.shape for part in parts], image.height, image.width)}
        for (category, _), parts in objects.items()
    ]


def _union(shapes: list[Any], height: int, width: int) -> Any:
    """Return the union of shapes: rings unchanged if all are rings, otherwise the union as run lengths."""
    if all(isinstance(shape, list) for shape in shapes):
        return shapes
    if len(shapes) == 1:
        return shapes[0]
    rles = [read_rle([s] if isinstance(s, list) else s, height, width, "a part of an object") for s in shapes]
    merged = coco_mask.merge(rles)
    return {"size": [height, width], "counts": _rle_text(merged)}


def check_canvas(height: int, width: int) -> None:
    """Raise DataError if a stated image size exceeds 2^30 pixels. Call it before memory is allocated for the image."""
    if height * width > _MAX_PIXELS:
        raise DataError(f"belongs to an image of {width} x {height} pixels; the limit is {_MAX_PIXELS}")


def encode_window(mask: np.ndarray, x: int, y: int, height: int, width: int) -> dict[str, Any]:
    """Return the RLE of a mask [h, w] bool with its upper left corner at x, y of an image. It is cut at the frame.

    Raises:
        DataError: the mask is outside the frame, or the stated size of the image exceeds 2^30 pixels.
    """
    check_canvas(height, width)
    if not (-mask.shape[1] < x < width and -mask.shape[0] < y < height):
        raise DataError(f"has a mask outside the {width} x {height} pixels of its image")
    canvas = np.zeros((height, width), np.uint8, order="F")
    top, left = max(y, 0), max(x, 0)
    inside = mask[top - y : height - y, left - x : width - x]
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return {"size": [height, width], "counts": _rle_text(coco_mask.encode(canvas))}


def _rle_text(rle: Any) -> str:
    return rle["counts"].decode()
