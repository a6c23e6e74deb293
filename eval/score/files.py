"""Reading of the JSON and PNG files that `m2f score` compares. Errors name the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import MAX_CATEGORIES, Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import BrokenImageError, decode_id_png, decode_index_map, read_header
from m2f.data_pipeline.json_fields import optional_flag
from m2f.data_pipeline.keys import key_problem
from m2f.data_pipeline.label_space import describe_subset, require_match
from m2f.data_pipeline.readers.coco_json import optional_area, whole_number
from m2f.eval.errors import EvaluationError

CATEGORIES_FILE = "categories.json"
_PLAIN_RGB = bytes([8, 2, 0, 0, 0])
"""Bytes of a PNG header: bit depth, colour type, compression, filter, interlace."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can contain and UTF-8 cannot."""
MAX_PIXELS = 2**28
"""Larger maps are rejected before decoding."""


@dataclass(frozen=True, slots=True)
class ScoredCategory:
    """A category in the JSON file of the truth."""

    id: int
    name: str
    is_thing: bool | None
    """None if the file does not state it."""


def read_document(path: Path, *lists: str) -> dict[str, Any]:
    """Read a JSON object that has lists of these names. Raises EvaluationError naming the file and the problem."""
    document = read_json(path)
    if isinstance(document, list):
        raise EvaluationError(
            f"{path} is a list, like COCO results for `m2f score instances`; it must be an object with `{lists[0]}`"
        )
    for name in lists:
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise EvaluationError(f"{path} has no list `{name}`; it is not a COCO annotation file")
    return document


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises EvaluationError naming the file."""
    return parse_file(read_bytes(path), path)


def parse_file(data: bytes, path: Path) -> Any:
    """Parse the JSON content of a file. Raises EvaluationError naming the file."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise EvaluationError(f"{path} is not valid JSON: {error}") from error


def read_categories(document: Mapping[str, Any], path: Path) -> tuple[ScoredCategory, ...]:
    """Return a COCO file's categories in its order. Raises EvaluationError for a missing, invalid or repeated id."""
    listed = []
    for position, entry in enumerate(document["categories"]):
        number = read_int(entry, "id", f"{path}: categories[{position}]")
        listed.append(ScoredCategory(number, str(entry.get("name", number)), _read_is_thing(entry, path)))
    if len({category.id for category in listed}) < len(listed):
        raise EvaluationError(f"{path}: two categories have the same id")
    if len(listed) > MAX_CATEGORIES:
        raise EvaluationError(
            f"{path} lists {len(listed)} categories, more than {MAX_CATEGORIES}; it is not a list of classes"
        )
    return tuple(listed)


@dataclass(frozen=True, slots=True)
class PredictedClasses:
    """Relation between category ids of predictions and those of the truth."""

    truth_id: Mapping[int, int] | None
    """Category id of the truth by category id of the predictions. None if no table describes the ids of the
    predictions, which then are ids of the truth."""
    dropped: frozenset[int] = frozenset()
    """Category ids of the predictions whose classes the truth lacks. Such predictions are not scored."""
    note: str | None = None
    """One line that names the classes that one of the two tables lacks; None if there are none."""

    def labels(self, labels: Mapping[int, int]) -> dict[int, int]:
        """Return the class by category id of the predictions, given the class by category id of the truth."""
        if self.truth_id is None:
            return dict(labels)
        return {predicted: labels[true] for predicted, true in self.truth_id.items()}


def match_predictions(
    document: Any, predictions: Path, categories: Sequence[ScoredCategory], truth: Path, *, compare_kinds: bool
) -> PredictedClasses:
    """Find the classes of predictions in the truth's table by name.

    The table of the predictions is the list `categories` in their file, else the file `categories.json` beside it,
    which `m2f predict` and `m2f eval --dump` write. With `compare_kinds`, thing and stuff must agree too. Raises
    EvaluationError if the tables contradict each other; the message shows the rows that differ.
    """
    table_path = predictions.with_name(CATEGORIES_FILE)
    if isinstance(document, dict) and isinstance(document.get("categories"), list):
        listed, path = document["categories"], predictions
    elif table_path.is_file() and table_path != truth and isinstance(listed := read_json(table_path), list):
        path = table_path
    else:
        return PredictedClasses(None)
    stated = read_categories({"categories": listed}, path)
    compare_kinds = compare_kinds and all(c.is_thing is not None for c in stated)
    predicted = _as_categories(stated, compare_kinds)
    expected = _as_categories(categories, compare_kinds)
    try:
        matched = require_match(predicted, expected, str(path), str(truth))
    except DataError as error:
        raise EvaluationError(str(error)) from error
    truth_id = {
        c.id: expected[label].id for c, label in zip(predicted, matched.labels, strict=True) if label is not None
    }
    dropped = frozenset(c.id for c in predicted) - truth_id.keys()
    return PredictedClasses(truth_id, dropped, describe_subset(matched, str(path), str(truth)))


def _as_categories(categories: Sequence[ScoredCategory], compare_kinds: bool) -> list[Category]:
    """Return the categories for a comparison. Without `compare_kinds`, all of them are things."""
    return [Category(c.id, c.name, bool(c.is_thing) or not compare_kinds, (0, 0, 0)) for c in categories]


def _read_is_thing(entry: Mapping[str, Any], path: Path) -> bool | None:
    """Return the flag; None if it is missing or null, which does not mean stuff."""
    return None if entry.get("isthing") is None else read_flag(entry, "isthing", f"{path}: category {entry['id']}")


def read_flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """Return a flag: 0, 1, true or false; false if missing. Raises EvaluationError naming entry and value."""
    try:
        return optional_flag(entry, name, where)
    except DataError as error:
        raise EvaluationError(str(error)) from error


def read_area(entry: Any, where: str) -> float:
    """Return the stated area, a finite number of at least 0. Raises EvaluationError naming entry and value."""
    require_field(entry, "area", where)
    try:
        area = optional_area(entry, where)
    except DataError as error:
        raise EvaluationError(str(error)) from error
    if area is None:
        raise EvaluationError(f"{where}: area is null; it must be a number of at least 0")
    return area


def read_int(entry: Any, name: str, where: str) -> int:
    """Return a field that is an integer. Raises EvaluationError naming entry and value."""
    try:
        return whole_number(entry, name, where)
    except DataError as error:
        raise EvaluationError(str(error)) from error


def require_field(entry: Any, name: str, where: str) -> Any:
    """Return a field of a JSON object. Raises EvaluationError if it is missing; the message starts with `where`."""
    if not isinstance(entry, dict) or name not in entry:
        raise EvaluationError(f"{where} has no `{name}`: {str(entry)[:80]}")
    return entry[name]


def require_new_image(image_id: object, known: Container[object], where: str) -> None:
    """Raise EvaluationError for an image id that is known already, or that cannot be stored as UTF-8.

    The message starts with `where`, which names file and image.
    """
    if image_id in known:
        raise EvaluationError(f"{where} is listed twice; image ids must be unique")
    if isinstance(image_id, str) and SURROGATE.search(image_id):
        raise EvaluationError(
            f"{where} has the id {image_id!a:.60}, which contains half of a surrogate pair; no file can store it, so "
            "change the id"
        )


def mask_file(folder: Path, entry: Any, where: str) -> Path:
    """Return the file in `folder` that an annotation names.

    Raises EvaluationError for an invalid name; the message starts with `where`.
    """
    name = require_field(entry, "file_name", where)
    if (problem := key_problem(name)) is not None:
        raise EvaluationError(f"{where}: file_name {name!a:.100} {problem}; it must name a file in {folder}")
    return folder / name


def read_ids(path: Path) -> np.ndarray:
    """Return the segment ids [H, W] of a COCO panoptic PNG. Raises EvaluationError naming the file."""
    expected = "a panoptic map is an RGB PNG, id = R + 256 G + 65536 B"
    return _read_map(path, decode_id_png, ("png",), ("rgb", "rgba"), expected)


def is_plain_id_map(path: Path) -> bool:
    """Return whether a file is a PNG of 8-bit RGB, not interlaced, without transparency and within MAX_PIXELS."""
    data = read_bytes(path)
    try:
        header = read_header(data)
    except BrokenImageError:
        return False
    plain = data[24:29] == _PLAIN_RGB and b"tRNS" not in data[: data.find(b"IDAT")]
    return header.ext == "png" and plain and header.height * header.width <= MAX_PIXELS


def read_labels(path: Path) -> np.ndarray:
    """Return the values [H, W] of a grey or palette map with 8 or 16 bits: PNG, TIFF or BMP.

    Raises EvaluationError naming the file.
    """
    expected = "a label map is a grey or palette PNG, TIFF or BMP"
    return _read_map(path, decode_index_map, ("png", "tif", "bmp"), ("gray", "palette"), expected)


def require_folder(path: Path, what: str) -> Path:
    """Return the folder. Raises EvaluationError if it does not exist."""
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder; it must contain {what}")
    return path


def first_few(values: Sequence[object], limit: int = 5) -> str:
    """Return the first few values as text for a message."""
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _read_map(
    path: Path, decode: Callable[[bytes], np.ndarray], formats: Sequence[str], modes: Sequence[str], expected: str
) -> np.ndarray:
    """Decode a map of one of the `formats` and `modes`. Raises EvaluationError naming the file and what is expected."""
    data = read_bytes(path)
    try:
        header = read_header(data)
        if header.ext not in formats or header.mode not in modes:
            raise BrokenImageError(f"it is a {header.mode} {header.ext}, but {expected}")
        if header.height * header.width > MAX_PIXELS:
            raise BrokenImageError(f"{header.width} x {header.height} pixels exceed the limit of {MAX_PIXELS}")
        return decode(data)
    except BrokenImageError as error:
        raise EvaluationError(f"{path}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises EvaluationError naming a file that cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}") from error
