"""Sliding windows: which window decides a pixel, and which segments of different windows are the same object.

docs/evaluation.md states the rule for users. A pixel is decided by the window whose border is farthest from it. Two
segments of one class from two windows are the same object if their IoU inside the windows' overlap is at least 0.5.
Each is paired with at most one segment of the other window, best scores first. An object that keeps less than half of
its largest part's pixels is omitted, because the windows that decide the other pixels contradict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple, Self

import numpy as np

from m2f.eval.config import Placement

SAME_OBJECT_IOU = 0.5
"""Lowest IoU, inside the overlap of two windows, at which two segments are the same object. PQ also uses 0.5."""


MIN_KEPT_SHARE = 0.5
"""Smallest share of its largest part's pixels that an object must keep."""


class Area(NamedTuple):
    """A rectangle of pixels of an image: rows `top` to `bottom` and columns `left` to `right`, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def intersection(self, other: Area) -> Area | None:
        """Return the intersection of both areas; None if it is empty."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Area(top, left, bottom, right) if top < bottom and left < right else None

    def slices(self, origin: Area) -> tuple[slice, slice]:
        """Return rows and columns in an array that starts at the corner of `origin`."""
        rows = slice(self.top - origin.top, self.bottom - origin.top)
        return rows, slice(self.left - origin.left, self.right - origin.left)


@dataclass(frozen=True)
class WindowLayout:
    """Position of a window in the image."""

    area: Area
    """Pixels that the window shows."""
    core: Area
    """Pixels that the window decides. The cores of all windows partition the image."""
    overlaps: tuple[Area, ...]
    """Overlaps of this window with earlier and later windows, in the order of the windows."""


def window_starts(length: int, size: int, stride: int, placement: Placement = "stride") -> list[int]:
    """Return the start positions of windows along a side. The last window ends with the side.

    `placement` is explained in `SlidingWindows`.
    """
    last = max(0, length - size)
    if placement == "even" and last:
        gaps = -(-last // stride)
        return [last * gap // gaps for gap in range(gaps + 1)]
    return [*range(0, last, stride), last]


def window_places(
    image_size: tuple[int, int], size: int, stride: int, placement: Placement = "stride"
) -> list[WindowLayout]:
    """Return the windows of an image, row by row."""
    rows, columns = (_spans(window_starts(length, size, stride, placement), length, size) for length in image_size)
    areas = [Area(y.start, x.start, y.stop, x.stop) for y, x in product(rows.covered, columns.covered)]
    cores = [Area(y.start, x.start, y.stop, x.stop) for y, x in product(rows.decided, columns.decided)]
    return [
        WindowLayout(
            area, core, tuple(c for other in areas if other != area and (c := area.intersection(other)) is not None)
        )
        for area, core in zip(areas, cores, strict=True)
    ]


class _Spans(NamedTuple):
    """Windows along one side of an image."""

    covered: list[slice]
    """Pixels that each window shows."""
    decided: list[slice]
    """Spans decided by each window, cut in the middle of every overlap of neighbours."""


def _spans(starts: list[int], length: int, size: int) -> _Spans:
    """Return the windows that start at `starts` along a side of `length` pixels."""
    covered = [slice(start, min(start + size, length)) for start in starts]
    cuts = [(after.start + before.stop) // 2 for before, after in pairwise(covered)]
    edges = [0, *cuts, length]
    return _Spans(covered, [slice(*edge) for edge in pairwise(edges)])


@dataclass(frozen=True)
class WindowSegments:
    """Segments of one window, with class and score of each."""

    labels: np.ndarray
    """[n] int classes."""
    scores: np.ndarray
    """[n] float scores."""


class UnionFind:
    """Numbers the segments of all windows in order of arrival and joins them into objects (union-find)."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self, count: int) -> int:
        """Add `count` segments and return the number of the first."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return first

    def find(self, segment: int) -> int:
        """Return the lowest number among the segments of the same object."""
        while self._parent[segment] != segment:
            self._parent[segment] = segment = self._parent[self._parent[segment]]
        return segment

    def union(self, first: int, second: int) -> Self:
        """Join the objects of two segments into one."""
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low
        return self


def match_segments(one: WindowSegments, other: WindowSegments, ious: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of segments of two windows that are the same object, given their IoU [n, m] inside the overlap.

    Pairs with a higher sum of scores are chosen first; ties keep the order of the segments.
    """
    can_match = (ious >= SAME_OBJECT_IOU) & (one.labels[:, None] == other.labels[None])
    rows, columns = can_match.nonzero()
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
    """Return, for each of `size` pixels along a side, the one of `source` pixels that contains its centre."""
    return ((2 * np.arange(size) + 1) * source) // (2 * size)
