"""One annotated image, as readers return it, shards store it and evaluation uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from m2f.data_pipeline.errors import DataError

VOID_ID = 0
"""Local id of pixels without a segment in `seg` and in every layer of `inst`."""

MAX_IDS_8_BIT = 254
"""Largest number of ids in an 8-bit map: 0 is void, and 255 is reserved for an ignore id."""
_MAX_IDS = 2**16 - 1
"""Largest number of ids in a 16-bit map: 0 is void."""


def id_dtype(num_ids: int) -> type[np.uint8] | type[np.uint16]:
    """Return the smallest dtype of a map with ids 1..num_ids. Raises DataError if 16 bits cannot hold them."""
    if num_ids > _MAX_IDS:
        raise DataError(f"its map has {num_ids} segments; the limit is {_MAX_IDS}, leave out or join small ones")
    return np.uint8 if num_ids <= MAX_IDS_8_BIT else np.uint16


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment or instance: the pixels of its map that equal `id`."""

    id: int
    """Local id from 1, unique within its map (for `inst`, over all layers)."""
    category_id: int
    """Id in the source data set; ids may have gaps. See CategoryTable for contiguous classes."""
    is_thing: bool
    is_crowd: bool
    area: float
    """Area in pixels as stated by the source (COCO: the polygon's area), otherwise the number of pixels."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    source_id: int
    """Annotation or segment id in the source data set."""
    map: Literal["seg", "inst"]
    layer: int = 0
    """Layer of `inst`; 0 for `seg`."""
    polygons: tuple[tuple[float, ...], ...] | None = None
    """Rings x, y, x, y, ... in pixels, unchanged from the source. None if the source has no polygons for the mask."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Ground truth of one image at its original size. At least one of `seg` and `inst` is present."""

    seg: np.ndarray | None
    """[H, W] uint8 or uint16: map of panoptic or semantic segments; VOID_ID marks unlabelled pixels."""
    inst: np.ndarray | None
    """[Y, H, W] uint8 or uint16: instances in Y layers, so that they may overlap; VOID_ID marks background."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its annotation, checked and ready to be written to a shard."""

    key: str
    """Name that is unique in the data set. It has only ASCII letters, digits, `_` and `-`, so that every tar tool
    groups the members correctly."""
    image_id: int
    """Integer id in the source (COCO image id), otherwise the index in the reader's order. AP sorts detections of equal
    score by it."""
    source: str
    """Origin of the image. Errors about the image name it."""
    image: bytes
    """Original bytes of the image file."""
    image_ext: Literal["jpg", "png"]
    height: int
    width: int
    annotation: Annotation
    left_out: tuple[str, ...] = ()
    """Unusable annotations that are not in `annotation`: one text each, with the reason."""
    repairs: tuple[str, ...] = ()
    """Repaired or doubtful annotations and images, one text per case. The report counts equal texts."""


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """A sample read from a shard, with its image decoded."""

    key: str
    image_id: int
    source: str
    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    annotation: Annotation
    image_ext: str = "jpg"
    """File name ending of the stored image."""

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]
