"""Files that `m2f score` compares: JSON and PNG, with errors that name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import MAX_CATEGORIES
from m2f.data_pipeline.image_file import BrokenImageError, decode_id_png, decode_index_png, read_header
from m2f.eval.errors import EvaluationError

MAX_PIXELS = 2**28
"""Larger maps are refused before they are decoded."""


@dataclass(frozen=True, slots=True)
class ScoredCategory:
    """A category of the truth's JSON."""

    id: int
    name: str
    is_thing: bool
    """False where the file does not say."""


def read_document(path: Path, *lists: str) -> dict[str, Any]:
    """A JSON object with these lists. Raises EvaluationError naming the file and what is missing."""
    document = read_json(path)
    if isinstance(document, list):
        raise EvaluationError(
            f"{path} is a list, as COCO results of `m2f score instances` are, but an object with `{lists[0]}` is needed"
        )
    for name in lists:
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise EvaluationError(f"{path} has no list `{name}`; it is not a COCO annotation file")
    return document


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises EvaluationError naming it."""
    data = _read(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # brackets nested thousands deep are no JSON of ours
        raise EvaluationError(f"{path} is not valid JSON: {error}") from error


def read_categories(document: Mapping[str, Any], path: Path) -> tuple[ScoredCategory, ...]:
    """The categories of a COCO file in its order. Raises EvaluationError for a missing or repeated id."""
    try:
        listed = [
            ScoredCategory(int(entry["id"]), str(entry.get("name", entry["id"])), bool(entry.get("isthing", 0)))
            for entry in document["categories"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{path}: a category has no whole number as `id` ({error!r})") from error
    if len({category.id for category in listed}) < len(listed):
        raise EvaluationError(f"{path}: two categories have the same id")
    if len(listed) > MAX_CATEGORIES:
        raise EvaluationError(
            f"{path} lists {len(listed)} categories, more than {MAX_CATEGORIES}; it is no list of classes"
        )
    return tuple(listed)


def require(entry: Any, name: str, where: str) -> Any:
    """A field of a JSON object. Raises EvaluationError beginning with `where` if it is not there."""
    if not isinstance(entry, dict) or name not in entry:
        raise EvaluationError(f"{where} has no `{name}`: {str(entry)[:80]}")
    return entry[name]


def read_ids(path: Path) -> np.ndarray:
    """Segment ids [H, W] of a COCO panoptic PNG. Raises EvaluationError naming the file."""
    return _read_map(path, decode_id_png, ("rgb", "rgba"), "a panoptic map is an RGB PNG, id = R + 256 G + 65536 B")


def read_labels(path: Path) -> np.ndarray:
    """Values [H, W] of a grey or palette PNG, 8 or 16 bits. Raises EvaluationError naming the file."""
    return _read_map(path, decode_index_png, ("gray", "palette"), "a label map is a grey or palette PNG")


def require_folder(path: Path, what: str) -> Path:
    """The folder itself. Raises EvaluationError if there is none."""
    if not path.is_dir():
        raise EvaluationError(f"{path} is no folder; it should hold {what}")
    return path


def some(values: Sequence[object], limit: int = 5) -> str:
    """The first few values for a message."""
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _read_map(path: Path, decode: Callable[[bytes], np.ndarray], modes: Sequence[str], expected: str) -> np.ndarray:
    data = _read(path)
    try:
        header = read_header(data)
        if header.ext != "png" or header.mode not in modes:
            raise BrokenImageError(f"it is a {header.mode} {header.ext}, but {expected}")
        if header.height * header.width > MAX_PIXELS:
            raise BrokenImageError(f"{header.width} x {header.height} pixels are more than {MAX_PIXELS}")
        return decode(data)
    except BrokenImageError as error:
        raise EvaluationError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}") from error
