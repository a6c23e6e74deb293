"""Windows over an image, and objects across them: which window decides a pixel, which segments are one object.

The rule, stated for users in docs/evaluation.md: a pixel is decided by the window whose border is farthest from it.
Two segments of one class from two windows are one object if they agree where both windows see: by an IoU of at
least 0.5 inside the overlap of the windows, each with at most one segment of the other window, best scores first.
An object that keeps less than half of its largest part is left out: the windows that decide the rest disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple, Self

import numpy as np

SAME_OBJECT_IOU = 0.5
"""Agreement inside the overlap of two windows from which two segments are one object, as PQ matches segments."""


KEPT_SHARE = 0.5
"""Share of the pixels of its largest part that an object must keep."""


class Area(NamedTuple):
    """A rectangle of pixels of an image: rows `top` to `bottom`, columns `left` to `right`, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def common(self, other: Area) -> Area | None:
        """The pixels of both, None where there are none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Area(top, left, bottom, right) if top < bottom and left < right else None

    def slices(self, origin: Area) -> tuple[slice, slice]:
        """Rows and columns in an array that begins at the corner of `origin`."""
        rows = slice(self.top - origin.top, self.bottom - origin.top)
        return rows, slice(self.left - origin.left, self.right - origin.left)


@dataclass(frozen=True)
class WindowPlace:
    """Where a window lies in the image."""

    area: Area
    """What it sees."""
    core: Area
    """The pixels that it decides: the cores of all windows share the image out."""
    overlaps: tuple[Area, ...]
    """Its part in common with every other window, those before it and those after it in the order of windows."""


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows start along a side, the last one moved back to end with it."""
    last = max(0, length - size)
    return [*range(0, last, stride), last]


def window_places(image_size: tuple[int, int], size: int, stride: int) -> list[WindowPlace]:
    """The windows of an image, row by row."""
    rows, columns = (_spans(length, size, stride) for length in image_size)
    areas = [Area(y.start, x.start, y.stop, x.stop) for y, x in product(rows.seen, columns.seen)]
    cores = [Area(y.start, x.start, y.stop, x.stop) for y, x in product(rows.decided, columns.decided)]
    return [
        WindowPlace(area, core, tuple(c for other in areas if other != area and (c := area.common(other)) is not None))
        for area, core in zip(areas, cores, strict=True)
    ]


class _Spans(NamedTuple):
    """Windows along one side."""

    seen: list[slice]
    decided: list[slice]
    """Cut in the middle of every overlap of neighbours."""


def _spans(length: int, size: int, stride: int) -> _Spans:
    starts = window_starts(length, size, stride)
    seen = [slice(start, min(start + size, length)) for start in starts]
    cuts = [(after.start + before.stop) // 2 for before, after in pairwise(seen)]
    edges = [0, *cuts, length]
    return _Spans(seen, [slice(*edge) for edge in pairwise(edges)])


@dataclass(frozen=True)
class Found:
    """The segments of one window: class and score of each."""

    labels: np.ndarray
    """[n] int"""
    scores: np.ndarray
    """[n] float"""


class Objects:
    """Segments of all windows by number, in the order in which they came, joined to objects."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self, count: int) -> int:
        """The number of the first of `count` new segments."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return first

    def of(self, segment: int) -> int:
        """The lowest number among the segments of the same object."""
        while self._parent[segment] != segment:
            self._parent[segment] = segment = self._parent[self._parent[segment]]
        return segment

    def join(self, first: int, second: int) -> Self:
        """Make one object of two."""
        low, high = sorted((self.of(first), self.of(second)))
        self._parent[high] = low
        return self


def same_objects(one: Found, other: Found, ious: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of segments of two windows that are one object, from their IoU [n, m] inside the overlap of the windows.

    Pairs of higher scores (their sum) come first; equal ones in the order of the segments.
    """
    alike = (ious >= SAME_OBJECT_IOU) & (one.labels[:, None] == other.labels[None])
    rows, columns = alike.nonzero()
    order = np.argsort(-(one.scores[rows] + other.scores[columns]), kind="stable")
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in taken[0] and column not in taken[1]:
            pairs.append((row, column))
            taken[0].add(row)
            taken[1].add(column)
    return pairs


def nearest_pixels(size: int, source: int) -> Sequence[int] | np.ndarray:
    """For each of `size` pixels along a side the one of `source` pixels that its middle falls on."""
    return ((2 * np.arange(size) + 1) * source) // (2 * size)
