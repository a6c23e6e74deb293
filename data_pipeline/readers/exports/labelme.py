"""Reader of labelme exports: a JSON file per image with its shapes."""

from __future__ import annotations

import base64
import os
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_index_png
from m2f.data_pipeline.json_fields import field
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_json import whole_number
from m2f.data_pipeline.readers.exports.object_parts import (
    INVALID_FIELD,
    AnnotatedImage,
    ObjectPart,
    categories_from_names,
    encode_window,
    shapes_reader,
)
from m2f.data_pipeline.readers.files import files_below, read_json, relative_name, require_folder
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sources import LabelmeSource

_MAX_COORDINATE = 1e7
"""Limit of the absolute value of coordinates in pixels. Only damaged numbers exceed it."""
_IGNORED_LABELS = ("__ignore__", "_background_")
"""Labels that labelme's examples use for regions that are not objects."""


def open_labelme(source: LabelmeSource, max_pixels: int) -> CocoInstancesReader:
    """Return the reader of all labelme files below the folder `annotations`. Other JSON files are ignored.

    Shapes with the same label and `group_id` form one object.

    Raises:
        DataError: a JSON file is invalid, or there is no class or no image.
    """
    folder, images = require_folder(source.annotations), require_folder(source.images)
    files = files_below(folder, ".json")
    documents = [(path, document) for path in files if is_labelme(document := read_json(str(path)))]
    labels = (shape.get("label") for _, document in documents for shape in _shapes(document))
    names = source.classes or sorted({str(label) for label in labels if label is not None})
    names = [name for name in names if name not in _IGNORED_LABELS]
    categories = categories_from_names(names)
    label_ids = {category.name: category.id for category in categories.categories}
    unusable: list[UnusableAnnotation] = []
    annotated = []
    image_names = _locate_moved_images([_image_name(path, document, images) for path, document in documents], images)
    has_images = any((images / name).is_file() for name in image_names)
    if not has_images and any(document.get("imageData") for _, document in documents):
        raise DataError(
            f"{images} has none of the {len(documents)} images of {folder}; the JSON files contain them as imageData. "
            "Write them to files with the command in docs/own_data.md (labelme)"
        )
    for (path, document), image_name in zip(documents, image_names, strict=True):
        height, width = (whole_number(document, side, str(path)) for side in ("imageHeight", "imageWidth"))
        parts = []
        for number, shape in enumerate(_shapes(document)):
            if shape.get("label") in _IGNORED_LABELS:
                continue
            try:
                parts.append(_part(shape, label_ids, height, width))
            except DataError as error:
                unusable.append(UnusableAnnotation(str(path), f"shapes[{number}] {error}"))
        annotated.append(AnnotatedImage(image_name, height, width, tuple(parts)))
    return shapes_reader(images, categories, annotated, max_pixels, unusable)


def is_labelme(document: Any) -> bool:
    """Return whether a JSON document has the form of a labelme file."""
    return isinstance(document, dict) and isinstance(document.get("shapes"), list) and "imagePath" in document


def _shapes(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [shape if isinstance(shape, dict) else {} for shape in document["shapes"]]


def _image_name(path: Path, document: dict[str, Any], images: Path) -> str:
    """Return the image's path relative to the folder of images.

    If `imagePath` leads out of that folder, with and without its symbolic links resolved, only its file name is used.
    """
    image_path = PureWindowsPath(str(document["imagePath"])).as_posix()  # labelme on Windows writes backslashes
    target, root = (path.parent / image_path).resolve(), images.resolve()
    if not target.is_relative_to(root):  # a symbolic link inside the folder may lead out of it
        linked, folder = Path(os.path.abspath(path.parent / image_path)), Path(os.path.abspath(images))
        if linked.is_relative_to(folder) and linked.is_file():
            target, root = linked, folder
    name = target.relative_to(root).as_posix() if target.is_relative_to(root) else target.name
    return relative_name(name, str(path))


def _locate_moved_images(names: list[str], images: Path) -> list[str]:
    """Return the names of images relative to their folder, with the names of missing images corrected if possible.

    labelme writes bare file names, and its files are often moved to a folder of their own. A missing image is therefore
    replaced by the unused image with the same file name. Of several, it is the one with the longest common path. The
    image stays missing if two images are equally near, or if another missing image has the same replacement.
    """
    missing = {name for name in names if not (images / name).is_file()}
    if not missing:
        return names
    places: dict[str, list[str]] = {}
    for name in {path.relative_to(images).as_posix() for path in files_below(images, "")} - set(names):
        places.setdefault(PurePosixPath(name).name, []).append(name)
    nearest: dict[str, str] = {}
    for name in missing:
        found = places.get(PurePosixPath(name).name, [])
        depths = [len(PurePosixPath(os.path.commonpath((name, place))).parts) for place in found]
        if found and depths.count(max(depths)) == 1:
            nearest[name] = found[depths.index(max(depths))]
    counts = Counter(nearest.values())
    return [nearest[name] if counts[nearest.get(name, "")] == 1 else name for name in names]


def _part(shape: dict[str, Any], label_ids: dict[str, int], height: int, width: int) -> ObjectPart:
    label, kind = str(field(shape, "label", INVALID_FIELD)), shape.get("shape_type") or "polygon"
    if label not in label_ids:
        raise DataError(f"has the label {label[:40]!r}, which source.classes does not list")
    try:
        points = np.array(field(shape, "points", INVALID_FIELD), np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise DataError("has points that are not pairs of numbers") from None
    group = None if shape.get("group_id") is None else str(shape["group_id"])
    if not (np.abs(points) < _MAX_COORDINATE).all() or len(points) < (3 if kind == "polygon" else 2):
        raise DataError(f"is a {kind} with too few points ({len(points)}), or has points far outside the image")
    match kind:
        case "polygon":
            ring = points
        case "rectangle":
            (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)  # X-AnyLabeling writes all four corners
            ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        case "circle":
            angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
            radius = np.hypot(*(points[1] - points[0]))
            ring = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        case "mask":
            x, y = np.rint(points[0]).astype(int).tolist()
            return ObjectPart(label_ids[label], encode_window(_mask(shape), x, y, height, width), group)
        case _:
            raise DataError(f"is a {str(kind)[:20]}, which has no area; draw a polygon")
    return ObjectPart(label_ids[label], ring.reshape(-1).tolist(), group)


def _mask(shape: dict[str, Any]) -> np.ndarray:
    try:
        return decode_index_png(base64.b64decode(str(shape.get("mask")), validate=True)) > 0
    except ValueError as error:  # also BrokenImageError and binascii.Error
        raise DataError(f"has a mask that is not a grey PNG: {error}") from error
