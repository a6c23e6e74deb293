"""The parts of COCO JSON files that panoptic and instance data sets share: images, categories, annotations."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.categories import Category, CategoryTable
from data_pipeline.errors import DataError
from data_pipeline.readers.files import read_json, relative_name, some

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An entry of `images`."""

    id: int
    file_name: str
    height: int
    width: int


def read_document(path: str, required: Collection[str]) -> dict[str, Any]:
    """A COCO JSON file that has all required lists. Raises DataError naming what is missing."""
    document = read_json(path)
    missing = [name for name in required if not isinstance(document, dict) or not isinstance(document.get(name), list)]
    if missing:
        raise DataError(f"{path} has no list {some(missing)}; it is not a COCO annotation file")
    return document


def read_images(document: Mapping[str, Any], path: str) -> tuple[CocoImage, ...]:
    """All images, in the order of the file. Raises DataError for an empty set, missing fields and repeated ids."""
    if not document["images"]:
        raise DataError(f"{path} lists no image; the data set is empty")
    images = []
    for number, entry in enumerate(document["images"]):
        where = f"{path}: images[{number}]"
        name = relative_name(field(entry, "file_name", where), where)
        height, width = (whole_number(entry, side, where) for side in ("height", "width"))
        images.append(CocoImage(whole_number(entry, "id", where), name, height, width))
    require_unique((image.id for image in images), f"{path}: image ids")
    return tuple(images)


def read_categories(document: Mapping[str, Any], path: str, things_only: bool) -> CategoryTable:
    """The category table; `things_only` for instance files, whose categories do not say."""
    categories = []
    for number, entry in enumerate(document["categories"]):
        where = f"{path}: categories[{number}]"
        is_thing = True if things_only else bool(field(entry, "isthing", where))
        name = str(field(entry, "name", where))
        categories.append(Category(whole_number(entry, "id", where), name, is_thing, read_color(entry, number)))
    if not categories:
        raise DataError(f"{path} lists no category")
    return CategoryTable(tuple(categories))


def read_color(entry: Mapping[str, Any], number: int) -> tuple[int, int, int]:
    """RGB colour of a category, or one of a fixed palette where the file gives none."""
    color = entry.get("color")
    if isinstance(color, Sequence) and len(color) == 3:
        red, green, blue = (int(channel) for channel in color)
        return red, green, blue
    hue = number * 0.618034 % 1.0  # steps of the golden ratio spread evenly for any number of categories
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (number % 3) / 2, 0.95 - 0.35 * (number % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def group_by_image(
    document: Mapping[str, Any], images: Collection[CocoImage], path: str, strict: bool
) -> dict[int, list[dict[str, Any]]]:
    """Annotations of every image id. With `strict`, one that belongs to no image is an error, else it is left out."""
    groups: dict[int, list[dict[str, Any]]] = {image.id: [] for image in images}
    strangers = []
    for number, entry in enumerate(document["annotations"]):
        image_id = whole_number(entry, "image_id", f"{path}: annotations[{number}]")
        if image_id in groups:
            groups[image_id].append(entry)
        else:
            strangers.append(image_id)
    if strict and strangers:
        raise DataError(
            f"{path}: {len(strangers)} annotations belong to images that it does not list: {some(strangers)}"
        )
    return groups


def require_known_categories(used: Counter[int], categories: CategoryTable, path: str) -> None:
    """Raise DataError that lists category ids without a category."""
    unknown = [f"{i} ({count} times)" for i, count in sorted(used.items()) if i not in categories.by_id]
    if unknown:
        raise DataError(f"{path}: annotations use category ids that `categories` does not define: {some(unknown, 20)}")


def require_unique(ids: Any, what: str) -> None:
    """Raise DataError that lists ids which appear more than once."""
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{what} must be unique; these appear more than once: {some(repeated)}")


def field(entry: Any, name: str, where: str) -> Any:
    """A field that must be there. Raises DataError naming the entry."""
    if not isinstance(entry, dict) or name not in entry:
        raise DataError(f"{where} has no field {name!r}")
    return entry[name]


def whole_number(entry: Any, name: str, where: str) -> int:
    """A field that must be a whole number (also one written as text). Raises DataError naming the entry."""
    value = field(entry, name, where)
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} is {value!r}, not a whole number") from None
    if isinstance(value, float) and number != value:
        raise DataError(f"{where}: {name} is {value!r}, not a whole number")
    return number


def stated_box(entry: Mapping[str, Any]) -> Box | None:
    """The bounding box as the file states it; None where it gives none (or an empty list)."""
    box = entry.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4:
        return None
    x, y, width, height = (float(value) for value in box)
    return x, y, width, height
