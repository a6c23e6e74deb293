"""Run-length masks: a typed interface to pycocotools' C routines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import cv2
import numpy as np
from pycocotools import mask as coco_masks

Rle = dict[str, Any]
"""COCO run-length encoding: `size` [H, W] and compressed `counts`, as bytes or text."""


@dataclass(frozen=True)
class TextMasks(Sequence[Rle]):
    """Masks of one size. The `Rle` of a mask is made on access, because many masks are never compared."""

    size: tuple[int, int]
    """Height and width in pixels."""
    texts: Sequence[str]
    """Compressed `counts` of every mask."""

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Rle: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Rle]: ...

    def __getitem__(self, index: int | slice) -> Rle | Sequence[Rle]:
        if isinstance(index, slice):
            return TextMasks(self.size, self.texts[index])
        return {"size": self.size, "counts": self.texts[index]}


def chosen_masks(masks: Sequence[Rle], positions: Iterable[int]) -> list[Rle]:
    """Return the masks at these positions."""
    if isinstance(masks, TextMasks):
        size, texts = masks.size, masks.texts
        return [{"size": size, "counts": texts[i]} for i in positions]
    return [masks[i] for i in positions]


def encode_masks(masks: Iterable[np.ndarray]) -> tuple[Rle, ...]:
    """Return the run-length encodings of masks [H, W] bool, or of an array [N, H, W] of masks, one at a time."""
    return tuple(map(_encode, masks))


def _encode(mask: np.ndarray) -> Rle:
    # COCO's runs follow columns, so its routine needs [H, W, 1] in Fortran order, which is the transposed mask.
    columns = cv2.transpose(np.ascontiguousarray(mask).view(np.uint8))
    return cast("list[Rle]", coco_masks.encode(cast("Any", columns.T[..., None])))[0]


def encode_columns(columns: np.ndarray, left: int, size: tuple[int, int]) -> Rle:
    """Encode a mask of `size` (height, width) that has pixels only in the columns [H, w] bool from `left` on."""
    height, width = size
    flat = np.concatenate([[False], columns.T.ravel(), [False]])
    changes = (flat[1:] != flat[:-1]).nonzero()[0] + left * height
    counts = np.diff(changes, prepend=0, append=height * width)
    if len(changes) and changes[-1] == height * width:
        counts = counts[:-1]  # COCO's encoder omits a last empty run
    return cast("Any", coco_masks).frPyObjects({"size": list(size), "counts": counts.tolist()}, height, width)


def mask_areas(masks: Sequence[Rle]) -> np.ndarray:
    """Return the number of pixels of every mask: [N] float64."""
    # pycocotools stores the number of masks in eight bits, so a call takes at most 255.
    groups = (list(masks[start : start + 255]) for start in range(0, len(masks), 255))
    areas = [np.asarray(coco_masks.area(cast("Any", group)), dtype=np.float64) for group in groups]
    return np.concatenate([np.zeros(0), *areas])


def mask_boxes(masks: Sequence[Rle]) -> np.ndarray:
    """Return the smallest box of every mask as x, y, width, height: [N, 4] float64; zeros for an empty mask."""
    boxes = coco_masks.toBbox(cast("Any", list(masks))) if masks else []
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def mask_ious(detected: Sequence[Rle], annotated: Sequence[Rle], is_crowd: np.ndarray) -> np.ndarray:
    """Return the IoU [D, G] float64. For crowds (flags [G]) it is the intersection divided by the detection's area."""
    if not detected or not annotated:
        return np.zeros((len(detected), len(annotated)))
    ious = coco_masks.iou(cast("Any", list(detected)), cast("Any", list(annotated)), is_crowd.tolist())
    return np.asarray(ious)


def box_ious(detected: np.ndarray, annotated: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Return the IoU [D, G] float64 of boxes [D, 4] and [G, 4] as x, y, width, height; crowds as in `mask_ious`."""
    if not len(detected) or not len(annotated):
        return np.zeros((len(detected), len(annotated)))
    first, second = (np.ascontiguousarray(boxes, dtype=np.float64) for boxes in (detected, annotated))
    return np.asarray(coco_masks.iou(cast("Any", first), cast("Any", second), is_crowd.tolist()))


def decode_mask(mask: Rle) -> np.ndarray:
    """Return the pixels [H, W] bool of one mask."""
    return np.asarray(cast("Any", coco_masks).decode(mask), dtype=bool)
