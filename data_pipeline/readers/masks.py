"""Convert COCO segmentations (polygons, compressed and uncompressed RLE) into layers of an id map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.json_fields import optional_flag
from m2f.data_pipeline.readers.coco_json import FLAT_FIELD, RENUMBERED_FIELD, Box, optional_area, optional_box
from m2f.data_pipeline.readers.run_lengths import DamagedRunsError, check_counts, text_areas
from m2f.data_pipeline.sample import Segment, id_dtype

_MAX_POLYGON_EXTENT = 10
"""Limit of polygon coordinates as a multiple of the longer image side. Larger ones are refused."""
RENUMBERED_IDS = "annotations with a missing, repeated or unusable id, renumbered"
FLAT_RINGS = "objects whose polygon is not in a list of polygons (VIA writes this), read as one polygon"
SHORT_RINGS = "objects with stray rings of at most two points, which were left out"
NO_PIXELS = "objects whose mask has no pixel (normalised coordinates?)"
OUTSIDE = "objects outside the frame of their image (rescaled images, or x and y swapped?)"
PARTLY_OUTSIDE = "objects with more than a fifth of their polygons outside the frame (rescaled images?)"
AREA_MISMATCH = "segments whose pixels are less than half or more than twice their stated area (rescaled images?)"
_MIN_CHECKED_AREA = 100
"""Smallest area in pixels that is checked. In smaller segments, the border is a large part of the area."""
_MIN_AREA_RATIO = 0.5
"""Smallest accepted ratio of the smaller to the larger of stated area and pixels, as AREA_MISMATCH says."""
_MAX_SHARE_OUTSIDE = 0.2
"""Share of an object's area outside the frame above which it is reported. Annotators often exceed the frame by a pixel
or two."""
_MAX_RLE_PIXELS = 2**32
"""Height x width must be below this, because pycocotools counts in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class InstanceLayers:
    """The instances of one image in layers."""

    inst: np.ndarray
    """[Y, H, W] uint8 or uint16 local ids; 0 is background."""
    segments: tuple[Segment, ...]
    left_out: tuple[str, ...]
    """Unusable annotations, one text each with the reason; see Sample.left_out."""
    repairs: tuple[str, ...]
    """Repaired or doubtful annotations; see Sample.repairs."""


def instance_layers(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, categories: CategoryTable, where: str
) -> InstanceLayers:
    """Return layers and segments of one image's instances, including crowds.

    An annotation without a pixel (a polygon thinner than the grid) keeps its segment, because the official evaluation
    counts it. Unusable annotations are left out and listed in the result.

    Args:
        annotations: COCO annotations of the image.
        height: height of the image in pixels.
        width: width of the image in pixels.
        categories: category table of the data set.
        where: description of the image for messages.
    """
    usable: list[Mapping[str, Any]] = []
    rles, left_out = [], []
    for entry in annotations:
        try:
            rles.append(_annotation_rle(entry, height, width, f"{where}: annotation {entry['id']}"))
            usable.append(entry)
        except DataError as error:
            left_out.append(str(error))
    masks = (np.asarray(coco_mask.decode(rle)) for rle in rles)
    inst, layers, measured = stack_layers(masks, len(usable), height, width)
    segments = []
    for local_id, (entry, layer, (pixels, box)) in enumerate(zip(usable, layers, measured, strict=True), start=1):
        name = f"{where}: annotation {entry['id']}"
        area = optional_area(entry, name)
        segments.append(
            Segment(
                id=local_id,
                category_id=int(entry["category_id"]),
                is_thing=categories.by_id[int(entry["category_id"])].is_thing,
                is_crowd=optional_flag(entry, "iscrowd", name),
                area=float(pixels) if area is None else area,
                bbox=optional_box(entry, name) or box,
                source_id=int(entry["id"]),
                map="inst",
                layer=layer,
                polygons=_rings(entry["segmentation"]),
            )
        )
    repairs = [RENUMBERED_IDS for entry in usable if RENUMBERED_FIELD in entry]
    repairs += [FLAT_RINGS for entry in usable if FLAT_FIELD in entry]
    outside = [share_outside(segment.polygons or (), height, width) for segment in segments]
    repairs += [OUTSIDE if share == 1 else PARTLY_OUTSIDE for share in outside if share > _MAX_SHARE_OUTSIDE]
    repairs += area_mismatches(
        (segment.area, pixels)
        for segment, (pixels, _), share in zip(segments, measured, outside, strict=True)
        if share <= _MAX_SHARE_OUTSIDE  # otherwise the overhang explains the difference
    )
    repairs += [SHORT_RINGS for entry in usable if any(map(_is_short, _ring_list(entry["segmentation"])))]
    return InstanceLayers(inst=inst, segments=tuple(segments), left_out=tuple(left_out), repairs=tuple(repairs))


def area_mismatches(areas: Iterable[tuple[float, int]]) -> list[str]:
    """Return texts for Sample.repairs about doubtful segments, given pairs of stated area and number of pixels.

    The area of a polygon differs from its pixels along its border. Small segments and small differences are therefore
    accepted.
    """
    repairs = []
    for area, pixels in areas:
        if pixels == 0:
            repairs.append(NO_PIXELS)
        elif max(area, pixels) >= _MIN_CHECKED_AREA and min(area, pixels) < _MIN_AREA_RATIO * max(area, pixels):
            repairs.append(AREA_MISMATCH)
    return repairs


def share_outside(rings: Sequence[Sequence[float]], height: int, width: int) -> float:
    """Return the share, 0 to 1, of the area of polygons (rings x, y, x, y, ...) that lies outside the frame.

    The result is 1 only if all rings are completely outside. If a ring reaches into the frame and all rings together
    have an area below 100 pixels, the result is 0.
    """
    points = [np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings]
    if all((ring >= 0).all() and (ring <= (width, height)).all() for ring in points):
        return 0.0
    if all((ring.max(0) <= 0).any() or (ring.min(0) >= (width, height)).any() for ring in points):
        return 1.0
    total = sum(_ring_area(ring) for ring in points)
    if total < _MIN_CHECKED_AREA:
        return 0.0
    inside = sum(_ring_area(_clip(ring, height, width)) for ring in points)
    return min(1 - inside / total, 1 - 1e-9)


def _ring_area(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _clip(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip a ring [P, 2] at the four sides of the frame, one after the other (Sutherland and Hodgman, 1974)."""
    for axis, limit, sign in ((0, 0.0, 1), (0, float(width), -1), (1, 0.0, 1), (1, float(height), -1)):
        depths = sign * (ring[:, axis] - limit)
        next_points, next_depths = np.roll(ring, -1, axis=0), np.roll(depths, -1)
        clipped = []
        for point, next_point, depth, next_depth in zip(ring, next_points, depths, next_depths, strict=True):
            if depth >= 0:
                clipped.append(point)
            if (depth >= 0) != (next_depth >= 0):
                clipped.append(point + (next_point - point) * depth / (depth - next_depth))
        ring = np.array(clipped).reshape(-1, 2)
    return ring


def _annotation_rle(entry: Mapping[str, Any], height: int, width: int, name: str) -> Any:
    """Return the RLE of an annotation at the size of the image, exactly as pycocotools makes it.

    Raises:
        DataError: a field of the annotation is invalid. The message names the annotation.
    """
    optional_area(entry, name)
    optional_box(entry, name)
    return read_rle(entry.get("segmentation"), height, width, name)


def _ring_list(segmentation: Any) -> list[Any]:
    return segmentation if isinstance(segmentation, list) else []


def _is_short(ring: Any) -> bool:
    """Return whether a ring has at most two points, and therefore no area. Annotation tools write such rings."""
    return isinstance(ring, list) and len(ring) in (0, 2, 4)


def _rings(segmentation: Any) -> tuple[tuple[float, ...], ...] | None:
    """Return the rings with an area of a valid polygon segmentation; None for run lengths."""
    if not isinstance(segmentation, list):
        return None
    return tuple(tuple(map(float, ring)) for ring in segmentation if not _is_short(ring))


def stack_layers(
    masks: Iterable[np.ndarray], count: int, height: int, width: int
) -> tuple[np.ndarray, list[int], list[tuple[int, Box]]]:
    """Distribute masks [H, W] with ids 1..count over layers by first fit, so that masks in a layer do not overlap.

    Returns the layers [Y, H, W] (at least one), the layer of each mask, and the pixel count and bounding box of each
    mask.
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
    """Return x, y, width and height of the bounding box of a mask [H, W], where not 0; zeros for an empty mask."""
    if mask.itemsize != 1:  # the bytes of wider numbers would count as pixels
        mask = mask != 0
    if mask.flags.f_contiguous:  # true for masks of pycocotools
        y, x, height, width = cv2.boundingRect(mask.T.view(np.uint8))
    else:
        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return x, y, width, height


def read_rle(segmentation: Any, height: int, width: int, name: str) -> Any:
    """Check polygons or run lengths, and return them as compressed RLE for pycocotools.

    Raises:
        DataError: the segmentation is invalid or does not match the size of the image. The message begins with `name`.
    """
    if height * width >= _MAX_RLE_PIXELS:
        raise DataError(f"{name}: its image of {width} x {height} pixels is too large; run lengths have 32 bits")
    match segmentation:
        case {"counts": counts, "size": [int(rle_height), int(rle_width)]}:
            if (rle_height, rle_width) != (height, width):
                raise DataError(f"{name}: its RLE is {rle_width} x {rle_height}, but the image is {width} x {height}")
            return _checked_rle(counts, height, width, name)
        case [_, *_]:
            return _polygons(segmentation, height, width, name)
        case _:
            raise DataError(f"{name} has no usable `segmentation`: {str(segmentation)[:60]}")


def checked_areas(texts: Sequence[str], height: int, width: int) -> np.ndarray | None:
    """Return the pixel counts [N] int64 of masks given as compressed RLEs; None if one of them is invalid."""
    if height * width >= _MAX_RLE_PIXELS:
        return None
    try:
        areas = text_areas(texts, height, width)
    except DamagedRunsError:
        return None
    return areas if (areas >= 0).all() else None


def compressed_texts(segmentations: Sequence[Any], height: int, width: int) -> list[str] | None:
    """Return the run lengths of all masks as texts; None if one is not a compressed RLE of this size."""
    size = [height, width]
    texts = [s["counts"] for s in segmentations if type(s) is dict and s.get("size") == size and _is_text(s)]
    return texts if len(texts) == len(segmentations) else None


def _is_text(segmentation: dict[str, Any]) -> bool:
    return type(segmentation.get("counts")) is str and all(type(side) is int for side in segmentation["size"])


def _checked_rle(counts: Any, height: int, width: int, name: str) -> Any:
    """Check run lengths and return them as RLE for pycocotools, which does not check its input."""
    check_counts(counts, height, width, name)
    rle: Any = {"counts": counts, "size": [height, width]}
    return coco_mask.frPyObjects(rle, height, width) if isinstance(counts, list) else rle


def _polygons(polygons: list[Any], height: int, width: int, name: str) -> Any:
    # Rings of at most two points have no area. Only the other rings of the object are used, as in pycocotools.
    polygons = [ring for ring in polygons if not _is_short(ring)] or polygons
    for polygon in polygons:
        # pycocotools would interpret four numbers as a box.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{name}: a polygon needs an even number of at least 6 coordinates: {str(polygon)[:60]}")
        # It also walks along each edge, so huge coordinates would use up the memory or crash the process.
        limit = _MAX_POLYGON_EXTENT * max(height, width)
        if not _are_numbers_within(polygon, limit):
            raise DataError(f"{name}: a polygon has coordinates far outside the {width} x {height} pixels of its image")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def _are_numbers_within(values: list[Any], limit: float) -> bool:
    try:
        numbers = np.array(values)
    except ValueError:  # lists of different lengths
        return False
    return numbers.ndim == 1 and numbers.dtype.kind in "biuf" and bool(((-limit <= numbers) & (numbers <= limit)).all())
