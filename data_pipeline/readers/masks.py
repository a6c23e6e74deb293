"""COCO segmentations (polygons, compressed and uncompressed RLE) as layers of an id map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.json_fields import stated_flag
from m2f.data_pipeline.readers.coco_json import NUMBERED, Box, stated_area, stated_box
from m2f.data_pipeline.readers.run_lengths import DamagedRunsError, check_counts, text_areas
from m2f.data_pipeline.sample import Segment, id_dtype

_MAX_POLYGON_EXTENT = 10
"""Coordinates beyond this many image sides are refused."""
NUMBERED_IDS = "annotations with a missing, repeated or unusable id, numbered anew"
SHORT_RINGS = "objects with stray rings of at most two points, which were left out"
NO_PIXELS = "objects whose mask has no pixel (normalised coordinates?)"
OUTSIDE = "objects outside the frame of their image (rescaled images, or x and y exchanged?)"
OVERHANGING = "objects of whose polygons more than a fifth lies outside the frame (rescaled images?)"
OTHER_AREA = "segments whose pixels are less than half or more than twice their stated area (rescaled images?)"
_TELLING_AREA = 100
"""Pixels; in smaller segments the border is much of the area."""
_TELLING_SHARE = 0.5
_OVERHANG = 0.2
"""Share of an object's area beyond the frame that is worth a word; annotators cross the border by a pixel or two."""
_MAX_RLE_PIXELS = 2**32
"""pycocotools counts in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class InstanceLayers:
    """The instances of one image."""

    inst: np.ndarray
    """[Y, H, W] uint8 or uint16."""
    segments: tuple[Segment, ...]
    left_out: tuple[str, ...]
    """Annotations that cannot be used: which, and why."""
    repairs: tuple[str, ...]
    """As in Sample.repairs."""


def instance_layers(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, categories: CategoryTable, where: str
) -> InstanceLayers:
    """Layers and segments of one image's instances, crowds included.

    An annotation that covers no pixel (a polygon thinner than the grid) keeps its segment: the official evaluation
    counts it. Annotations that cannot be used are left out and named.
    """
    usable: list[Mapping[str, Any]] = []
    rles, left_out = [], []
    for entry in annotations:
        try:
            rles.append(_checked(entry, height, width, f"{where}: annotation {entry['id']}"))
            usable.append(entry)
        except DataError as error:
            left_out.append(str(error))
    masks = (np.asarray(coco_mask.decode(rle)) for rle in rles)
    inst, layers, measured = stack_layers(masks, len(usable), height, width)
    segments = []
    for local_id, (entry, layer, (pixels, box)) in enumerate(zip(usable, layers, measured, strict=True), start=1):
        name = f"{where}: annotation {entry['id']}"
        area = stated_area(entry, name)
        segments.append(
            Segment(
                id=local_id,
                category_id=int(entry["category_id"]),
                is_thing=categories.by_id[int(entry["category_id"])].is_thing,
                is_crowd=stated_flag(entry, "iscrowd", name),
                area=float(pixels) if area is None else area,
                bbox=stated_box(entry, name) or box,
                source_id=int(entry["id"]),
                map="inst",
                layer=layer,
                polygons=_rings(entry["segmentation"]),
            )
        )
    repairs = [NUMBERED_IDS for entry in usable if NUMBERED in entry]
    outside = [share_outside(segment.polygons or (), height, width) for segment in segments]
    repairs += [OUTSIDE if share == 1 else OVERHANGING for share in outside if share > _OVERHANG]
    repairs += disagreements(
        (segment.area, pixels)
        for segment, (pixels, _), share in zip(segments, measured, outside, strict=True)
        if share <= _OVERHANG  # else the reason is known
    )
    repairs += [SHORT_RINGS for entry in usable if any(map(_is_short, _ring_list(entry["segmentation"])))]
    return InstanceLayers(inst=inst, segments=tuple(segments), left_out=tuple(left_out), repairs=tuple(repairs))


def disagreements(areas: Iterable[tuple[float, int]]) -> list[str]:
    """What is doubtful about segments, given their stated areas and pixels; as in Sample.repairs.

    A polygon's area differs from its pixels along its border, so that small segments and small differences say nothing.
    """
    found = []
    for stated, pixels in areas:
        if pixels == 0:
            found.append(NO_PIXELS)
        elif max(stated, pixels) >= _TELLING_AREA and min(stated, pixels) < _TELLING_SHARE * max(stated, pixels):
            found.append(OTHER_AREA)
    return found


def share_outside(rings: Sequence[Sequence[float]], height: int, width: int) -> float:
    """Share of the area of polygons (rings x, y, x, y, ...) that lies outside the frame, 0 to 1.

    1 only where nothing of them touches the frame; 0 for polygons without an area, and where it is small.
    """
    points = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    if all((ring >= 0).all() and (ring <= (width, height)).all() for ring in points):
        return 0.0
    if all((ring.max(0) <= 0).any() or (ring.min(0) >= (width, height)).any() for ring in points):
        return 1.0
    whole = sum(_ring_area(ring) for ring in points)
    if whole < _TELLING_AREA:
        return 0.0
    inside = sum(_ring_area(_clipped(ring, height, width)) for ring in points)
    return min(1 - inside / whole, 1 - 1e-9)


def _ring_area(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _clipped(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """The ring [P, 2] cut at the four sides of the frame, one after the other (Sutherland and Hodgman)."""
    for axis, limit, sign in ((0, 0.0, 1), (0, float(width), -1), (1, 0.0, 1), (1, float(height), -1)):
        depth = sign * (ring[:, axis] - limit)
        after, next_depth = np.roll(ring, -1, axis=0), np.roll(depth, -1)
        kept = []
        for point, following, here, there in zip(ring, after, depth, next_depth, strict=True):
            if here >= 0:
                kept.append(point)
            if (here >= 0) != (there >= 0):
                kept.append(point + (following - point) * here / (here - there))
        ring = np.array(kept).reshape(-1, 2)
    return ring


def _checked(entry: Mapping[str, Any], height: int, width: int, name: str) -> Any:
    """The RLE of an annotation, at the image's size exactly as pycocotools makes it.

    Raises DataError naming the annotation where a field of it cannot be used.
    """
    stated_area(entry, name)
    stated_box(entry, name)
    return read_rle(entry.get("segmentation"), height, width, name)


def _ring_list(segmentation: Any) -> list[Any]:
    return segmentation if isinstance(segmentation, list) else []


def _is_short(ring: Any) -> bool:
    """Whether this is a ring of at most two points, which encloses nothing; annotation tools leave some behind."""
    return isinstance(ring, list) and len(ring) in (0, 2, 4)


def _rings(segmentation: Any) -> tuple[tuple[float, ...], ...] | None:
    """Rings of a polygon segmentation that `_decode` has read; None for run lengths."""
    if not isinstance(segmentation, list):
        return None
    return tuple(tuple(map(float, ring)) for ring in segmentation if not _is_short(ring))


def stack_layers(
    masks: Iterable[np.ndarray], count: int, height: int, width: int
) -> tuple[np.ndarray, list[int], list[tuple[int, Box]]]:
    """Put masks [H, W] with ids 1..count into as few layers as first-fit needs, so that no two overlap in a layer.

    Returns the layers [Y, H, W] (at least one), the layer of every mask, and its pixels and bounding box.
    """
    layers = [np.zeros((height, width), id_dtype(count))]
    layer_of: list[int] = []
    measured: list[tuple[int, Box]] = []
    for local_id, mask in enumerate(masks, start=1):
        x, y, w, h = box = pixel_box(mask)
        window = (slice(y, y + h), slice(x, x + w))
        inside = np.ascontiguousarray(mask[window]) != 0
        layer = next((i for i, ids in enumerate(layers) if not (ids[window] * inside).any()), len(layers))
        if layer == len(layers):
            layers.append(np.zeros_like(layers[0]))
        layers[layer][window][inside] = local_id
        layer_of.append(layer)
        measured.append((int(np.count_nonzero(inside)), box))
    return np.stack(layers), layer_of, measured


def pixel_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around the non-zero pixels of a mask [H, W] bool or uint8; zeros where
    there is none.
    """
    if mask.flags.f_contiguous:  # as pycocotools makes them
        y, x, height, width = cv2.boundingRect(mask.T.view(np.uint8))
    else:
        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return x, y, width, height


def read_rle(segmentation: Any, height: int, width: int, name: str) -> Any:
    """Compressed RLE, as pycocotools takes it, of polygons or run lengths that were checked first.

    Raises DataError beginning with the name for what is neither, or does not fit to the size of its image.
    """
    if height * width >= _MAX_RLE_PIXELS:
        raise DataError(f"{name}: its image of {width} x {height} pixels is too large; run lengths have 32 bits")
    match segmentation:
        case {"counts": counts, "size": [int(rle_height), int(rle_width)]}:
            if (rle_height, rle_width) != (height, width):
                raise DataError(f"{name}: its RLE is {rle_width} x {rle_height}, the image {width} x {height}")
            return _checked_rle(counts, height, width, name)
        case [_, *_]:
            return _polygons(segmentation, height, width, name)
        case _:
            raise DataError(f"{name} has no usable `segmentation`: {str(segmentation)[:60]}")


def checked_areas(texts: Sequence[str], height: int, width: int) -> np.ndarray | None:
    """Pixels [N] int64 of masks given as compressed RLEs; None where one of them cannot be used."""
    if height * width >= _MAX_RLE_PIXELS:
        return None
    try:
        areas = text_areas(texts, height, width)
    except DamagedRunsError:
        return None
    return areas if (areas >= 0).all() else None


def compressed_texts(segmentations: Sequence[Any], height: int, width: int) -> list[str] | None:
    """The run lengths of all masks; None where one is no compressed RLE of this size."""
    size = [height, width]
    texts = [s["counts"] for s in segmentations if type(s) is dict and s.get("size") == size and _is_text(s)]
    return texts if len(texts) == len(segmentations) else None


def _is_text(segmentation: dict[str, Any]) -> bool:
    return type(segmentation.get("counts")) is str and all(type(side) is int for side in segmentation["size"])


def _checked_rle(counts: Any, height: int, width: int, name: str) -> Any:
    """An RLE for pycocotools, which itself trusts its input."""
    check_counts(counts, height, width, name)
    rle: Any = {"counts": counts, "size": [height, width]}
    return coco_mask.frPyObjects(rle, height, width) if isinstance(counts, list) else rle


def _polygons(polygons: list[Any], height: int, width: int, name: str) -> Any:
    # Rings of two points enclose nothing: the others of the object count, as in pycocotools.
    polygons = [ring for ring in polygons if not _is_short(ring)] or polygons
    for polygon in polygons:
        # pycocotools would silently take four numbers for a box.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{name}: a polygon needs an even number of at least 6 coordinates: {str(polygon)[:60]}")
        # It also walks along every edge: senseless coordinates would take all memory, or crash it.
        reach = _MAX_POLYGON_EXTENT * max(height, width)
        if not _are_numbers_within(polygon, reach):
            raise DataError(f"{name}: a polygon has coordinates far outside the {width} x {height} pixels of its image")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def _are_numbers_within(values: list[Any], limit: float) -> bool:
    try:
        numbers = np.array(values)
    except ValueError:  # lists of different lengths
        return False
    return numbers.ndim == 1 and numbers.dtype.kind in "biuf" and bool(((-limit <= numbers) & (numbers <= limit)).all())
