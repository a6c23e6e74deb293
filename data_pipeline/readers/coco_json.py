"""Parse the parts of COCO JSON files that panoptic and instance data sets share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.json_fields import field, read_flag
from m2f.data_pipeline.readers.files import displayed_size, read_json, relative_name, stored_name
from m2f.data_pipeline.readers.unusable import UnusableAnnotation

Box = tuple[float, float, float, float]
RENUMBERED_FIELD = "/numbered"
"""Field that marks annotations with a new id instead of the one in the file."""
FLAT_FIELD = "/flat"
"""Field that marks annotations whose `segmentation` in the file is one polygon instead of a list of polygons."""
SIZES_FROM_FILES = "images without a size in the JSON (read from the files)"
FOUND_BY_FILE_NAME = "images whose path in the JSON does not exist (found in the image folder by their file name)"
MAX_CATEGORY_ID = 2**31 - 1
"""Largest category id. The manifest stores category ids in 32 bits."""
MAX_AREA = 1e15
"""Largest area, far above any image. The manifest stores sums of areas in 64 bits."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image that a COCO JSON file lists under `images`."""

    id: int
    """Id in the file if all ids in it are integers of at most 18 digits (COCO), otherwise the position of the image in
    the file (Cityscapes, Mapillary)."""
    source_id: str
    """Id in the file as normalised text, by which annotations refer to the image."""
    file_name: str
    """Path relative to the folder of images."""
    height: int
    width: int
    repairs: tuple[str, ...] = ()
    """Repairs of the entry; see Sample.repairs."""


def read_document(path: str, required: Collection[str]) -> dict[str, Any]:
    """Read a COCO JSON file. Raises DataError, with the missing names, if it lacks one of the required lists."""
    document = read_json(path)
    require_lists(document, required, path)
    return document


def require_lists(document: Any, required: Collection[str], path: str) -> None:
    """Raise DataError, with the missing names, if a COCO document lacks one of the required lists."""
    missing = [name for name in required if not isinstance(document, dict) or not isinstance(document.get(name), list)]
    if missing:
        raise DataError(f"{path} has no list {format_list(missing)}; it is not a COCO annotation file")


def read_images(document: Mapping[str, Any], path: str, folder: Path | None = None) -> tuple[CocoImage, ...]:
    """Return all images in the order of the file.

    If the folder of images is given, sizes that the file does not state are read from the image files. If no stated
    path exists in that folder, the images are found by their file names.

    Raises:
        DataError: there is no image, a field is missing or invalid, or an id is repeated.
    """
    if not document["images"]:
        raise DataError(f"{path} lists no image; the data set is empty")
    images = []
    stated = [_stated_name(entry, f"{path}: images[{number}]") for number, entry in enumerate(document["images"])]
    names = stated if folder is None else _resolve_names(stated, folder)
    for number, (entry, name) in enumerate(zip(document["images"], names, strict=True)):
        where = f"{path}: images[{number}]"
        name = relative_name(name, where)
        repairs: tuple[str, ...] = () if names is stated else (FOUND_BY_FILE_NAME,)
        if folder is not None and not name.isascii():
            name = stored_name(folder, name) or name
        source_id = id_text(entry, "id", where)
        if folder is not None and (entry.get("height") is None or entry.get("width") is None):
            height, width = displayed_size(folder / name)
            repairs += (SIZES_FROM_FILES,)
        else:
            height, width = (whole_number(entry, side, where) for side in ("height", "width"))
        images.append(CocoImage(number, source_id, name, height, width, repairs))
    require_unique((image.source_id for image in images), f"{path}: image ids")
    if all(re.fullmatch(r"-?\d{1,18}", image.source_id) for image in images):  # the manifest stores 64 bits
        images = [replace(image, id=int(image.source_id)) for image in images]
    return tuple(images)


def _stated_name(entry: Any, where: str) -> str:
    """Return the path of an image as in the file, with `/`: tools on Windows write backslashes."""
    name = field(entry, "file_name", where)
    return name.replace("\\", "/") if isinstance(name, str) else relative_name(name, where)


def _resolve_names(stated: list[str], folder: Path) -> list[str]:
    """Return the stated paths, or the file names without folders if only these exist in the folder of images.

    Label Studio and some scripts write paths of another machine. File names that repeat do not identify an image.
    """
    names = [PurePosixPath(name).name for name in stated]
    is_elsewhere = len(set(names)) == len(names) and not any(stored_name(folder, name) for name in stated)
    return names if is_elsewhere and any(stored_name(folder, name) for name in names) else stated


def id_text(entry: Any, name: str, where: str) -> str:
    """Return an id, which may be an integer or text, as normalised text: 7, "7" and "007" become equal.

    Raises:
        DataError: the id is missing or invalid. The message names the entry.
    """
    value = field(entry, name, where)
    if isinstance(value, str) and value:
        return value.lstrip("0") or "0" if value.isascii() and value.isdigit() else value
    return str(whole_number(entry, name, where))


def read_categories(document: Mapping[str, Any], path: str, things_only: bool) -> CategoryTable:
    """Return the category table. With `things_only`, for instance files, all categories are things.

    Raises:
        DataError: there is no category, or an entry is invalid.
    """
    categories = []
    for number, entry in enumerate(document["categories"]):
        where = f"{path}: categories[{number}]"
        is_thing = True if things_only else read_flag(entry, "isthing", where)
        name = str(field(entry, "name", where))
        categories.append(Category(category_id(entry, "id", where), name, is_thing, read_color(entry, number, where)))
    if not categories:
        raise DataError(f"{path} lists no category")
    return CategoryTable(tuple(categories))


def with_listed_rings(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an annotation whose polygons are a list. VIA 2 writes one polygon without the list around it."""
    match entry.get("segmentation"):
        case [int() | float(), *_] as ring:
            return {**entry, "segmentation": [ring], FLAT_FIELD: True}
        case _:
            return entry


def read_color(entry: Mapping[str, Any], number: int, where: str) -> tuple[int, int, int]:
    """Return the RGB colour of a category, or a generated one if the file has none. Raises DataError if invalid."""
    match entry.get("color"):
        case None:
            return distinct_color(number)
        case [int(red), int(green), int(blue)] if all(0 <= channel <= 255 for channel in (red, green, blue)):
            return red, green, blue
        case color:
            raise DataError(f"{where}: color is {str(color)[:40]}, not three whole numbers from 0 to 255")


def group_by_image(
    document: Mapping[str, Any], image_ids: Iterable[str], path: str
) -> tuple[dict[str, list[dict[str, Any]]], list[UnusableAnnotation]]:
    """Return the annotations by the id of their image, and those whose image id is invalid or not in `image_ids`."""
    groups: dict[str, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    unlisted = []
    for number, entry in enumerate(document["annotations"]):
        where = f"annotations[{number}]"
        try:
            image_id = id_text(entry, "image_id", where)
        except DataError as error:
            unlisted.append(UnusableAnnotation(path, str(error)))
            continue
        if image_id in groups:
            groups[image_id].append(entry)
        else:
            message = f"{where} belongs to image {image_id[:40]}, which `images` does not list"
            unlisted.append(UnusableAnnotation(path, message))
    return groups, unlisted


def require_category(entry: Any, categories: CategoryTable, where: str) -> Category:
    """Return the category of an annotation. Raises DataError if its id is invalid or not in the table."""
    number = whole_number(entry, "category_id", where)
    if number not in categories.by_id:
        raise DataError(f"{where}: category_id is {str(number)[:40]}, which `categories` does not define")
    return categories.by_id[number]


def require_unique(ids: Any, what: str) -> None:
    """Raise DataError, with a list of the repeated ids, if ids are not unique."""
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{what} must be unique; these appear more than once: {format_list(repeated)}")


def whole_number(entry: Any, name: str, where: str) -> int:
    """Return a required field as an integer, which may be written as text. Raises DataError if it is not an integer."""
    value = field(entry, name, where)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):  # Python's JSON parser accepts Infinity
        raise DataError(f"{where}: {name} is {repr(value)[:40]}, not a whole number") from None
    if isinstance(value, float) and number != value:
        raise DataError(f"{where}: {name} is {value!r}, not a whole number")
    return number


def category_id(entry: Any, name: str, where: str) -> int:
    """Return the id of a category, an integer of 32 bits as stored in the manifest. Raises DataError if invalid."""
    number = whole_number(entry, name, where)
    if not -MAX_CATEGORY_ID <= number <= MAX_CATEGORY_ID:
        raise DataError(f"{where}: {name} is {str(number)[:40]}; category ids are limited to 32 bits, renumber them")
    return number


def read_segments(entry: Any, where: str) -> list[Any]:
    """Return the list of segments of a panoptic annotation. Raises DataError if it is missing or not a list."""
    segments = field(entry, "segments_info", where)
    if not isinstance(segments, list):
        raise DataError(f"{where}: segments_info is not a list")
    return segments


def optional_box(entry: Mapping[str, Any], where: str) -> Box | None:
    """Return the bounding box stated in the file; None if it is missing or empty. Raises DataError if invalid."""
    match entry.get("bbox"):
        case None | []:
            return None
        case [float() | int(), float() | int(), float() | int(), float() | int()] as box if all(map(_is_finite, box)):
            x, y, width, height = (float(value) for value in box)
            return x, y, width, height
        case box:
            raise DataError(f"{where}: bbox is {str(box)[:60]}, not four finite numbers")


def optional_area(entry: Mapping[str, Any], where: str) -> float | None:
    """Return the area stated in the file; None if it is missing. Raises DataError if it is invalid."""
    match entry.get("area"):
        case None:
            return None
        case (int() | float()) as area if 0 <= area <= MAX_AREA:
            return float(area)
        case area:
            raise DataError(f"{where}: area is {area!r:.40}; it must be a number from 0 to {MAX_AREA:.0e}")


def _is_finite(value: float) -> bool:
    """Return whether a JSON number is finite as a float. JSON integers can be too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
