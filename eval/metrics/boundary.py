"""Boundaries of masks (Cheng et al., Boundary IoU, CVPR 2021): the pixels of a mask near to its outline.

The Boundary AP and PQ of that paper take the smaller of mask IoU and boundary IoU for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.metrics.rle import Rle, decode_mask, encode_masks, mask_boxes

BOUNDARY_RATIO = 0.02
"""Width of a boundary as a share of the image's diagonal: the paper's value for COCO, LVIS and panoptic Cityscapes."""
INTERIOR = -1
"""Id of the pixels inside a segment that are not on its boundary."""


def boundary_width(size: tuple[int, int], ratio: float) -> int:
    """Pixels from the outline that still belong to the boundary, for an image of (height, width)."""
    height, width = size
    return max(1, round(ratio * float(np.sqrt(height**2 + width**2))))


def mask_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask [H, W] bool within `width` (in steps to any of 8 neighbours) of a pixel outside it.

    Beyond the image everything is outside. One erosion with a large square is equal to `width` erosions with a 3 x 3.
    """
    padded = np.pad(mask.view(np.uint8), 1)
    return mask & ~cv2.erode(padded, _structuring_element(width))[1:-1, 1:-1].view(bool)


def mask_boundaries(masks: Sequence[Rle], ratio: float) -> tuple[Rle, ...]:
    """Run-length boundaries of run-length masks. Looks only at the smallest box of each mask, which is equal."""
    outlines = []
    for mask, (x, y, w, h) in zip(masks, mask_boxes(masks).astype(int).tolist(), strict=True):
        pixels = decode_mask(mask)
        box = np.s_[y : y + h, x : x + w]
        pixels[box] = mask_boundary(np.ascontiguousarray(pixels[box]), boundary_width(pixels.shape, ratio))
        outlines += encode_masks(pixels[None])
    return tuple(outlines)


def outline_map(id_map: np.ndarray, width: int) -> np.ndarray:
    """An id map [H, W] with INTERIOR in place of every pixel that is not on its segment's boundary; void stays.

    All segments at once: a pixel is inside its segment where its neighbourhood has only one id. Ids below 2**24.
    """
    padded = np.pad(id_map.astype(np.float32), 1, constant_values=-1)
    window = _structuring_element(width)
    uniform = (cv2.erode(padded, window) == cv2.dilate(padded, window))[1:-1, 1:-1]
    return np.where(uniform & (id_map != VOID_ID), INTERIOR, id_map.astype(np.int64))


def _structuring_element(width: int) -> np.ndarray:
    return np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
