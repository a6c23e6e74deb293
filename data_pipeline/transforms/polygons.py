"""Instance masks that are rasterised from polygons at the size of the crop, as in the official code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from m2f.data_pipeline.transforms.augment import AugmentParams
from m2f.data_pipeline.transforms.targets import ImageTargets
from m2f.model.structures import BACKGROUND_ID

Rings = Sequence[Sequence[float]]
"""Polygons x, y, x, y, ... in pixels of the source image. The mask is their union."""

_MIN_POINTS = 3
"""Smallest number of points of a ring with an area."""


def redraw_polygons(
    targets: ImageTargets,
    polygons: Sequence[Rings | None],
    source_size: tuple[int, int],
    params: AugmentParams,
    size: tuple[int, int],
) -> ImageTargets:
    """Return targets of an augmented image with masks rasterised from polygons instead of resized.

    Targets without polygons keep their resized pixels. Masks that overlap are put into separate layers. Ignored pixels
    stay ignored unless a mask covers them.

    Args:
        targets: targets after the augmentation.
        polygons: rings of each target in source pixels; None for targets without polygons.
        source_size: height and width of the image before the augmentation.
        params: parameters of the augmentation.
        size: height and width of the part of the crop that shows the image.
    """
    if all(rings is None for rings in polygons):
        return targets
    maps = targets.id_maps
    empty_layer = np.where((maps == targets.ignore).any(axis=0), targets.ignore, BACKGROUND_ID).astype(maps.dtype)
    height, width = size
    layers: list[np.ndarray] = []
    layer_of = np.zeros_like(targets.layer)
    for row, rings in enumerate(polygons):
        local_id, layer = targets.local_id[row], targets.layer[row]
        if rings is None:
            window = slice(0, height), slice(0, width)
            mask = maps[layer][window] == local_id
        else:
            window, mask = rasterise([augment_ring(ring, source_size, params, size) for ring in rings], height, width)
        free_layers = (i for i, ids in enumerate(layers) if not (_is_object(ids[window], targets.ignore) & mask).any())
        index = next(free_layers, len(layers))
        if index == len(layers):
            layers.append(empty_layer.copy())
        layers[index][window][mask] = local_id
        layer_of[row] = index
    return replace(targets, id_maps=np.stack(layers), layer=layer_of)


def _is_object(ids: np.ndarray, ignore: int) -> np.ndarray:
    return (ids != BACKGROUND_ID) & (ids != ignore)


def augment_ring(
    ring: Sequence[float], source_size: tuple[int, int], params: AugmentParams, size: tuple[int, int]
) -> np.ndarray:
    """Return the points [n, 2] (x, y) of a ring in the crop, clipped to the part of `size` that shows the image."""
    height, width = size
    (source_height, source_width), (scaled_height, scaled_width) = source_size, params.scaled
    points = np.asarray(ring, np.float64).reshape(-1, 2) * (scaled_width / source_width, scaled_height / source_height)
    points -= (params.offset[1], params.offset[0])
    if params.flip:
        points[:, 0] = width - points[:, 0]
    for axis, limit in ((0, width), (1, height)):
        points = _clip_to_minimum(points, axis, 0.0)
        points[:, axis] *= -1
        points = _clip_to_minimum(points, axis, -float(limit))
        points[:, axis] *= -1
    return points


def _clip_to_minimum(points: np.ndarray, axis: int, limit: float) -> np.ndarray:
    """Clip a ring [n, 2] to coordinates of at least `limit` on one axis (Sutherland and Hodgman, 1974)."""
    next_points = np.roll(points, -1, axis=0)
    is_inside, next_is_inside = points[:, axis] >= limit, next_points[:, axis] >= limit
    if is_inside.all():
        return points
    crosses = is_inside != next_is_inside
    span = np.where(crosses, next_points[:, axis] - points[:, axis], 1.0)
    crossing = points + (next_points - points) * ((limit - points[:, axis]) / span)[:, None]
    crossing[:, axis] = limit
    # Each edge contributes its crossing of the limit, if any, and then its end, if that is inside.
    return np.stack([crossing, next_points], axis=1)[np.stack([crosses, next_is_inside], axis=1)]


def rasterise(rings: Sequence[np.ndarray], height: int, width: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Rasterise the union of rings [n, 2] by the rule of COCO's code.

    Returns the window (rows, columns) of the frame `height` x `width` that holds the union, and the mask [h, w] bool of
    this window.
    """
    rings = [ring for ring in rings if len(ring) >= _MIN_POINTS]
    if not rings:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), bool)
    # The window starts at a whole pixel, so that coordinates are rounded as in the whole frame.
    left, top = np.floor(np.min([ring.min(axis=0) for ring in rings], axis=0)).astype(int).tolist()
    right, bottom = np.ceil(np.max([ring.max(axis=0) for ring in rings], axis=0)).astype(int).tolist()
    rows, columns = slice(top, min(bottom + 1, height)), slice(left, min(right + 1, width))
    shape = rows.stop - rows.start, columns.stop - columns.start
    if 0 in shape:
        return (rows, columns), np.zeros(shape, bool)
    from pycocotools import mask as coco_mask  # imported here, so that other settings train without pycocotools

    flat = [(ring - (left, top)).ravel().tolist() for ring in rings]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, *shape)))
    return (rows, columns), np.asarray(mask).view(bool)
