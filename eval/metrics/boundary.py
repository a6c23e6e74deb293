"""Boundaries of masks (Cheng et al., Boundary IoU, CVPR 2021): the pixels of a mask close to its outline.

Boundary AP and PQ of that paper use the smaller of mask IoU and boundary IoU for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.metrics.rle import Rle, decode_mask, encode_masks, mask_boxes

BOUNDARY_RATIO = 0.02
"""Boundary width as a share of the image diagonal: the paper's value for COCO, LVIS and panoptic Cityscapes."""
INTERIOR = -1
"""Id of pixels that are inside a segment and not on its boundary."""


def boundary_width(size: tuple[int, int], ratio: float) -> int:
    """Return the width of a boundary in pixels, at least 1, for an image of (height, width)."""
    height, width = size
    return max(1, round(ratio * float(np.sqrt(height**2 + width**2))))


def mask_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels of a mask [H, W] bool that are at most `width` steps from a pixel outside the mask.

    A step leads to any of the 8 neighbours. Everything beyond the image is outside. One erosion with a large square
    equals `width` erosions with a 3 x 3 square.
    """
    padded = np.pad(mask.view(np.uint8), 1)
    return mask & ~cv2.erode(padded, _structuring_element(width))[1:-1, 1:-1].view(bool)


def mask_boundaries(masks: Sequence[Rle], ratio: float) -> tuple[Rle, ...]:
    """Return the boundaries of run-length masks as run-length masks. Only the box of each mask is eroded."""
    outlines = []
    for mask, (x, y, w, h) in zip(masks, mask_boxes(masks).astype(int).tolist(), strict=True):
        pixels = decode_mask(mask)
        box = np.s_[y : y + h, x : x + w]
        pixels[box] = mask_boundary(np.ascontiguousarray(pixels[box]), boundary_width(pixels.shape, ratio))
        outlines += encode_masks(pixels[None])
    return tuple(outlines)


def outline_map(id_map: np.ndarray, width: int) -> np.ndarray:
    """Return the id map [H, W] with INTERIOR for every pixel that is not on its segment's boundary; void is unchanged.

    All segments are processed at once: a pixel is interior if its neighbourhood contains only one id. Ids must be below
    2**24.
    """
    padded = np.pad(id_map.astype(np.float32), 1, constant_values=-1)
    window = _structuring_element(width)
    uniform = (cv2.erode(padded, window) == cv2.dilate(padded, window))[1:-1, 1:-1]
    return np.where(uniform & (id_map != VOID_ID), INTERIOR, id_map.astype(np.int64))


def _structuring_element(width: int) -> np.ndarray:
    """Return a square that extends `width` pixels from its centre in each direction."""
    return np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
