"""Reader of `CVAT for images 1.1`: an XML file with the shapes of all images."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_json import whole_number
from m2f.data_pipeline.readers.exports.object_parts import (
    INVALID_FIELD,
    AnnotatedImage,
    ObjectPart,
    categories_from_names,
    check_canvas,
    encode_window,
    shapes_reader,
)
from m2f.data_pipeline.readers.exports.xml_file import read_xml
from m2f.data_pipeline.readers.files import relative_name, require_folder, stored_name
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sources import CvatSource

_FRAME_ENDINGS = ("", ".PNG", ".png")
"""Endings of the image files that the XML leaves out. It names frames of videos without their ending."""


def open_cvat(source: CvatSource, max_pixels: int) -> CocoInstancesReader:
    """Return the reader of the data set.

    Shapes with the same label and group form one object. Shapes are stacked in the order of `z_order`.

    Raises:
        DataError: the XML file is invalid, is a video export, or names no class or image.
    """
    images = require_folder(source.images)
    root = read_xml(source.annotations)
    if root.find("track") is not None:
        raise DataError(f"{source.annotations} is a video export; export as `CVAT for images 1.1`")
    categories = categories_from_names(
        list(dict.fromkeys(e.text or "" for e in root.iterfind("meta//labels/label/name")))
    )
    label_ids = {category.name: category.id for category in categories.categories}
    unusable: list[UnusableAnnotation] = []
    annotated = []
    for element in _used_images(root, source):
        name = _image_name(element, images, f"{source.annotations}: image {element.get('id')}")
        height, width = (whole_number(element.attrib, side, f"image {name}") for side in ("height", "width"))
        parts = []
        for number, shape in enumerate(element):
            if shape.tag == "tag":
                continue
            try:
                part = _part(shape, label_ids, height, width)
                parts.append((whole_number({"z_order": "0", **shape.attrib}, "z_order", INVALID_FIELD), part))
            except DataError as error:
                message = f"image {name}, shape {number} ({shape.tag}) {error}"
                unusable.append(UnusableAnnotation(source.annotations, message))
        parts.sort(key=lambda pair: pair[0])  # stable, so that shapes of one level keep the order of the file
        annotated.append(AnnotatedImage(name, height, width, tuple(part for _, part in parts)))
    return shapes_reader(images, categories, annotated, max_pixels, unusable)


def _used_images(root: Element, source: CvatSource) -> list[Element]:
    """Return the images in the subset of the source. Raises DataError if the file has no such subset."""
    images = root.findall("image")
    subsets = dict.fromkeys(image.get("subset", "") for image in images)
    if source.subset is not None and source.subset not in subsets:
        raise DataError(
            f"{source.annotations} has no subset {source.subset!r}, only {format_list(map(repr, subsets))}; correct "
            "datasets.<name>.source.subset"
        )
    return [image for image in images if source.subset in (None, image.get("subset", ""))]


def listed_names(image: Element) -> list[str]:
    """Return the possible paths of an `<image>` relative to the folder of images, the most specific first.

    Exports of projects have a folder for each subset.
    """
    name = image.get("name", "").replace("\\", "/")  # tasks that were created on Windows contain backslashes
    parents = [f"{subset}/", ""] if (subset := image.get("subset")) else [""]
    return [f"{parent}{name}{ending}" for parent in parents for ending in _FRAME_ENDINGS]


def _image_name(image: Element, images: Path, where: str) -> str:
    """Return the path of an image relative to the folder of images. Raises DataError if it leads out of the folder."""
    names = listed_names(image)
    likely = (name for name in names if os.path.isdir((images / name).parent))  # for the message about a missing image
    return relative_name(stored_name(images, *names) or next(likely, names[0]), where)


def _part(shape: Element, label_ids: dict[str, int], height: int, width: int) -> ObjectPart:
    label, group = shape.get("label", ""), shape.get("group_id")
    if label not in label_ids:
        raise DataError(f"has the label {label[:40]!r}, which the file does not define")
    ids = label_ids[label], None if group in (None, "", "0") else group
    match shape.tag:
        case "polygon":
            ring = _numbers(shape.get("points", "").replace(";", ","))
            if len(ring) < 6 or len(ring) % 2:
                raise DataError(f"has {len(ring)} coordinates; a polygon needs x and y of at least 3 points")
        case "box":
            x0, y0, x1, y1 = (_number(shape, name) for name in ("xtl", "ytl", "xbr", "ybr"))
            ring = _rotated(shape, np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]))
        case "ellipse":
            x, y, rx, ry = (_number(shape, name) for name in ("cx", "cy", "rx", "ry"))
            angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
            ring = _rotated(shape, np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1))
        case "mask":
            return ObjectPart(ids[0], _mask(shape, height, width), ids[1])
        case _:
            raise DataError("has no area; draw a polygon or a mask")
    return ObjectPart(ids[0], ring, ids[1])


def _rotated(shape: Element, points: np.ndarray) -> list[float]:
    """Return points [P, 2] as x, y, x, y, ..., rotated by the `rotation` of the shape in degrees.

    CVAT rotates a shape about the centre of its bounding box, clockwise in the image.
    """
    angle = np.deg2rad(_numbers(shape.get("rotation", "0"))[0])
    if angle:
        sine, cosine = np.sin(angle), np.cos(angle)
        center = (points.min(axis=0) + points.max(axis=0)) / 2
        points = center + (points - center) @ np.array([(cosine, sine), (-sine, cosine)])
    return points.reshape(-1).tolist()


def _mask(shape: Element, height: int, width: int) -> dict[str, object]:
    """Return the mask of a shape as COCO run lengths of the whole image.

    CVAT writes runs row by row within the window of the mask, beginning with background.

    Raises:
        DataError: the runs or the window are invalid, or the window is outside the image.
    """
    x, y, w, h = (whole_number(shape.attrib, name, INVALID_FIELD) for name in ("left", "top", "width", "height"))
    runs = _numbers(shape.get("rle", ""))
    if (
        not (0 < w <= 2 * width and 0 < h <= 2 * height)
        or min(runs) < 0
        or sum(runs) != w * h
        or any(r % 1 for r in runs)
    ):
        raise DataError(f"has run lengths that do not fill its window of {w} x {h} pixels")
    check_canvas(height, width)
    values = np.repeat(np.arange(len(runs)) % 2 == 1, np.array(runs, np.int64)).reshape(h, w)
    return encode_window(values, x, y, height, width)


def _number(shape: Element, name: str) -> float:
    return _numbers(shape.get(name, ""))[0]


def _numbers(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise DataError("has coordinates that are not numbers") from None
    if not np.isfinite(values).all():
        raise DataError("has coordinates that are not finite")
    return values
