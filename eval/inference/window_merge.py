"""Merge panoptic and instance predictions of overlapping windows one by one, without masks of the whole image.

Of each window, two things are kept: data for the comparison with its neighbours (rule in `windows`), and the pixels
that it decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m2f.eval.inference.image_output import ImageOutput
from m2f.eval.inference.windows import (
    MIN_KEPT_SHARE,
    Area,
    UnionFind,
    WindowLayout,
    WindowSegments,
    match_segments,
    nearest_pixels,
)
from m2f.eval.metrics.instance_matching import InstanceDetections
from m2f.eval.metrics.overlaps import count_overlaps
from m2f.eval.metrics.rle import Rle, decode_mask, encode_columns, encode_masks, mask_areas, mask_ious
from m2f.model.config import PostprocessConfig
from m2f.model.inference.postprocess import panoptic, stream_instances
from m2f.model.structures import PanopticResult, PanopticSegment


@dataclass(frozen=True)
class _OpenSegmentMap:
    """Segments of a window that later windows may overlap."""

    area: Area
    ids: np.ndarray
    """[h, w] int32: 0, or 1 + the position of a segment in `window_segments`."""
    first: int
    """Number of the window's first segment among the segments of all windows."""
    window_segments: WindowSegments


class PanopticMerge:
    """Merges windows, which must be added in order before `result` is called. Stuff of one class is one segment."""

    def __init__(self, size: tuple[int, int], is_thing: Sequence[bool], config: PostprocessConfig) -> None:
        self._is_thing, self._config = is_thing, config
        self._segment_numbers = np.zeros(size, dtype=np.int32)
        """1 + segment number of every pixel; 0 for no segment."""
        self._open_windows: list[_OpenSegmentMap] = []
        self._segments: list[PanopticSegment] = []
        self._objects = UnionFind()
        self._first_stuff: dict[int, int] = {}

    def add(self, place: WindowLayout, output: ImageOutput) -> None:
        """Post-process one window and join its segments to those of earlier windows."""
        result = panoptic(*output, self._is_thing, self._config)
        segments = result.segments
        first = self._objects.add(len(segments))
        self._segments.extend(segments)
        window_segments = WindowSegments(np.array([s.label for s in segments]), np.array([s.score for s in segments]))
        window = _OpenSegmentMap(place.area, _consecutive_ids(result), first, window_segments)
        self._open_windows = [other for other in self._open_windows if other.area.bottom > place.area.top]
        for other in self._open_windows:
            self._join(other, window)
        for number, segment in enumerate(segments, first):
            if not segment.is_thing:
                self._objects.union(self._first_stuff.setdefault(segment.label, number), number)
        core = window.ids[place.core.slices(place.area)]
        self._segment_numbers[place.core.slices(Area(0, 0, 0, 0))] = np.where(core > 0, core + first, 0)
        self._open_windows.append(window)

    def _join(self, other: _OpenSegmentMap, window: _OpenSegmentMap) -> None:
        """Join things of two windows that are the same object."""
        intersection = other.area.intersection(window.area)
        if intersection is None:
            return
        overlaps = count_overlaps(
            other.ids[intersection.slices(other.area)], window.ids[intersection.slices(window.area)]
        )
        ious = np.zeros((len(other.window_segments.labels), len(window.window_segments.labels)))
        for (other_id, window_id), shared in overlaps.pixels.items():
            if other_id and window_id and self._is_thing[other.window_segments.labels[other_id - 1]]:
                union_area = overlaps.truth_area[other_id] + overlaps.predicted_area[window_id] - shared
                ious[other_id - 1, window_id - 1] = shared / union_area
        for other_id, window_id in match_segments(other.window_segments, window.window_segments, ious):
            self._objects.union(other.first + other_id, window.first + window_id)

    def result(self, original_size: tuple[int, int]) -> PanopticResult:
        """Return the segments at `original_size` (height, width), each with the best score of its parts.

        Things that keep less than MIN_KEPT_SHARE of their largest part are left out.
        """
        roots = [self._objects.find(number) for number in range(len(self._segments))]
        scores: dict[int, float] = {}
        largest: dict[int, int] = {}
        for root, segment in zip(roots, self._segments, strict=True):
            scores[root] = max(scores.get(root, 0.0), segment.score)
            largest[root] = max(largest.get(root, 0), segment.area if segment.is_thing else 0)
        kept_areas = self._areas(self._segment_numbers, roots)
        numbers = _nearest(self._segment_numbers, original_size)
        areas = self._areas(numbers, roots)
        present = [
            root for root in sorted(scores) if areas[root] and kept_areas[root] >= MIN_KEPT_SHARE * largest[root]
        ]
        ids = {root: position for position, root in enumerate(present, 1)}
        table = np.array([0, *(ids.get(root, 0) for root in roots)], dtype=np.int32)
        segments = (
            PanopticSegment(i, (s := self._segments[root]).label, s.is_thing, scores[root], int(areas[root]))
            for root, i in ids.items()
        )
        return PanopticResult(torch.from_numpy(table[numbers]), tuple(segments))

    @staticmethod
    def _areas(numbers: np.ndarray, roots: Sequence[int]) -> np.ndarray:
        """Return the number of pixels of every object, indexed by the object's lowest segment number."""
        pixel_counts = np.bincount(numbers.ravel(), minlength=len(roots) + 1)[1:]
        areas = np.zeros(len(roots), dtype=np.int64)
        np.add.at(areas, np.array(roots, dtype=np.int64), pixel_counts)
        return areas


def _consecutive_ids(result: PanopticResult) -> np.ndarray:
    """Return a map [H, W] int32 of 1 + the position of the pixel's segment in the list; 0 for no segment."""
    table = np.zeros(max((s.id for s in result.segments), default=0) + 1, dtype=np.int32)
    table[[s.id for s in result.segments]] = np.arange(1, len(result.segments) + 1)
    return table[result.segment_map.cpu().numpy()]


@dataclass(frozen=True)
class _OpenDetections:
    """Detections of a window that later windows may overlap."""

    area: Area
    strips: dict[Area, list[Rle]]
    """Masks inside the overlap with every other window, by overlap."""
    mask_index: np.ndarray
    first: int
    window_segments: WindowSegments


class InstanceMerge:
    """Merges the instances of windows, which must be added in order before `result` is called."""

    def __init__(self, size: tuple[int, int], is_thing: Sequence[bool], config: PostprocessConfig) -> None:
        self._size, self._is_thing, self._config = size, is_thing, config
        self._open_windows: list[_OpenDetections] = []
        self._objects = UnionFind()
        self._labels: list[int] = []
        self._scores: list[float] = []
        self._parts: list[int] = []
        """Position of every detection's mask in `_cores`."""
        self._cores: list[tuple[Area, Rle]] = []
        self._window_areas: list[float] = []
        """Pixels of every mask in its window."""

    def add(self, place: WindowLayout, output: ImageOutput) -> None:
        """Post-process one window and join its detections to those of earlier windows."""
        strips: dict[Area, list[Rle]] = {area: [] for area in place.overlaps}
        cores: list[Rle] = []

        def take(group: torch.Tensor) -> None:
            masks = group.cpu().numpy()
            cores.extend(encode_masks(masks[:, *place.core.slices(place.area)]))
            self._window_areas.extend(int(np.count_nonzero(mask)) for mask in masks)
            for area, strip_masks in strips.items():
                strip_masks.extend(encode_masks(masks[:, *area.slices(place.area)]))

        ranking = stream_instances(*output, self._is_thing, self._config, take)
        window_segments = WindowSegments(ranking.labels.cpu().numpy(), ranking.scores.cpu().numpy().astype(np.float64))
        first = self._objects.add(len(window_segments.labels))
        window = _OpenDetections(place.area, strips, ranking.mask_index.cpu().numpy(), first, window_segments)
        self._open_windows = [other for other in self._open_windows if other.area.bottom > place.area.top]
        for other in self._open_windows:
            self._join(other, window)
        self._open_windows.append(window)
        self._parts.extend((window.mask_index + len(self._cores)).tolist())
        self._cores.extend((place.core, mask) for mask in cores)
        self._labels.extend(window_segments.labels.tolist())
        self._scores.extend(window_segments.scores.tolist())

    def _join(self, other: _OpenDetections, window: _OpenDetections) -> None:
        """Join detections of two windows that are the same object."""
        intersection = other.area.intersection(window.area)
        if intersection is None or not len(other.mask_index) or not len(window.mask_index):
            return
        other_masks, window_masks = other.strips[intersection], window.strips[intersection]
        ious = mask_ious(other_masks, window_masks, np.zeros(len(window_masks), dtype=bool))
        # An empty mask matches nothing. pycocotools does not define the IoU of two empty masks.
        ious = np.where((mask_areas(other_masks)[:, None] > 0) & (mask_areas(window_masks)[None] > 0), ious, 0.0)
        detection_ious = ious[np.ix_(other.mask_index, window.mask_index)]
        for first, second in match_segments(other.window_segments, window.window_segments, detection_ious):
            self._objects.union(other.first + first, window.first + second)

    def result(self, original_size: tuple[int, int]) -> InstanceDetections:
        """Return the `max_instances` best objects at `original_size` (height, width), each with its parts' best score.

        An object contains a pixel if one of its parts contains it in the window that decides the pixel.
        """
        parts: dict[int, list[int]] = {}
        scores: dict[int, float] = {}
        for detection, part in enumerate(self._parts):
            root = self._objects.find(detection)
            scores[root] = max(scores.get(root, 0.0), self._scores[detection])
            parts.setdefault(root, []).append(part)
        areas = mask_areas([mask for _, mask in self._cores])
        present = [root for root, masks in parts.items() if self._is_kept(masks, areas)]
        best = sorted(present, key=lambda root: (-scores[root], root))[: self._config.max_instances]
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(sorted(set(parts[root]))), len(places)) for root in best]
        return InstanceDetections(
            masks=tuple(self._mask(key, original_size) for key in places),
            mask_index=np.array(index, dtype=np.int64),
            labels=np.array([self._labels[root] for root in best], dtype=np.int64),
            scores=np.array([scores[root] for root in best], dtype=np.float64),
        )

    def _is_kept(self, parts: Sequence[int], areas: np.ndarray) -> bool:
        """Return whether an object keeps at least MIN_KEPT_SHARE of its largest part. `areas` are those of `_cores`."""
        distinct = sorted(set(parts))
        kept_area = sum(areas[distinct])
        if len({self._cores[part][0] for part in distinct}) < len(distinct):  # two masks of one window may share pixels
            kept_area = mask_areas([self._mask(distinct, self._size)])[0]
        return bool(kept_area > 0 and kept_area >= MIN_KEPT_SHARE * max(self._window_areas[part] for part in distinct))

    def _mask(self, parts: Sequence[int], original_size: tuple[int, int]) -> Rle:
        """Return the union of the parts, decoded only in the columns that they span: most objects are small."""
        pieces = [self._cores[part] for part in parts]
        left, right = min(core.left for core, _ in pieces), max(core.right for core, _ in pieces)
        canvas = np.zeros((self._size[0], right - left), dtype=bool)
        for core, mask in pieces:
            canvas[core.slices(Area(0, left, 0, right))] |= decode_mask(mask)
        if original_size != self._size:
            full_mask = np.zeros(self._size, dtype=bool)
            full_mask[:, left:right] = canvas
            return encode_masks([_nearest(full_mask, original_size)])[0]
        return encode_columns(canvas, left, original_size)


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map to `size` (height, width) by nearest neighbour."""
    if values.shape == size:
        return values
    return values[np.ix_(*(nearest_pixels(n, source) for n, source in zip(size, values.shape, strict=True)))]
