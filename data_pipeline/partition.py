"""Segments of a map in which each pixel value identifies a segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.sample import Annotation, Segment, id_dtype


class UnknownValueError(DataError):
    """Raised if a map has values without a class. The map may be correct and the list of classes incomplete."""


class Region(NamedTuple):
    """The segment that a pixel value belongs to. Values with equal regions form one segment."""

    category: Category
    source_id: int
    """Id of the segment, unique in its image."""
    is_crowd: bool = False


def partition(
    values: np.ndarray, classify: Callable[[int], Region | None], where: object, unknown_suffix: str
) -> Annotation:
    """Return the segments of a map, ordered by their lowest pixel value, as an annotation with a `seg` map.

    Args:
        values: [H, W] unsigned pixel values below 2^24.
        classify: returns the region of a value, or None for void. Raises KeyError with the unknown value or label.
        where: file or sample of the map, for the message.
        unknown_suffix: text after the list of unknown values in the message: the problem and the remedy.

    Raises:
        UnknownValueError: the map has unknown values.
    """
    runs = find_runs(values)
    present, value_index = np.unique(runs.value, return_inverse=True)
    areas = np.bincount(value_index, weights=runs.length)
    regions: dict[Region, int] = {}
    local_ids = np.zeros(len(present), np.uint32)
    unknown: dict[object, None] = {}
    for number, value in enumerate(present.tolist()):
        try:
            region = classify(value)
        except KeyError as error:
            unknown[error.args[0]] = None
            continue
        if region is not None:
            local_ids[number] = regions.setdefault(region, len(regions) + 1)
    if unknown:
        raise UnknownValueError(f"{where}: pixel values {format_list(unknown, 20)} {unknown_suffix}")
    local_ids = local_ids.astype(id_dtype(len(regions)))
    pixels = np.bincount(local_ids, weights=areas, minlength=len(regions) + 1)
    boxes = _boxes(runs, local_ids[value_index], len(regions))
    segments = tuple(
        Segment(
            id=local_id,
            category_id=region.category.id,
            is_thing=region.category.is_thing,
            is_crowd=region.is_crowd,
            area=float(pixels[local_id]),
            bbox=boxes[local_id - 1],
            source_id=region.source_id,
            map="seg",
        )
        for region, local_id in regions.items()
    )
    return Annotation(seg=runs.paint(local_ids[value_index]), inst=None, segments=segments)


class Runs(NamedTuple):
    """Runs of equal values in the rows of a map [H, W]. A map has few runs, which are faster to process than pixels."""

    value: np.ndarray
    """[R] value of each of the R runs."""
    start: np.ndarray
    """[R] flat index of the first pixel of each run, counted row by row."""
    length: np.ndarray
    """[R] number of pixels of each run."""
    shape: tuple[int, ...]
    """Height and width of the map."""

    def paint(self, values: np.ndarray) -> np.ndarray:
        """Return a map [H, W] in which run i has the value `values[i]`."""
        return np.repeat(values, self.length).reshape(self.shape)


def find_runs(values: np.ndarray) -> Runs:
    """Return the runs of a map [H, W], in the order of its pixels."""
    is_start = np.ones(values.shape, bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=is_start[:, 1:])
    start = np.flatnonzero(is_start)
    return Runs(values.ravel()[start], start, np.diff(start, append=values.size), values.shape)


def _boxes(runs: Runs, ids: np.ndarray, count: int) -> list[tuple[int, int, int, int]]:
    """Return x, y, width and height of ids 1..count. `ids` holds the id of each run; each id has at least one run."""
    row, column = np.divmod(runs.start, runs.shape[1])
    left, top = np.full(count + 1, runs.shape[1]), np.full(count + 1, runs.shape[0])
    right, bottom = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    np.minimum.at(left, ids, column)
    np.minimum.at(top, ids, row)
    np.maximum.at(right, ids, column + runs.length)
    np.maximum.at(bottom, ids, row + 1)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)[1:]
    return [(x, y, width, height) for x, y, width, height in boxes.tolist()]
