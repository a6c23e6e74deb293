"""One annotated image: what a reader yields, what a tar holds and what evaluation compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

VOID_ID = 0
"""Local id of pixels without a segment in `seg` and in every layer of `inst`."""

MAX_IDS_8_BIT = 254
"""Ids that an 8-bit map holds: 0 is void and 255 is left to whoever needs an ignore id."""


def id_dtype(num_ids: int) -> type[np.uint8] | type[np.uint16]:
    """Smallest dtype of a map with ids 1..num_ids."""
    return np.uint8 if num_ids <= MAX_IDS_8_BIT else np.uint16


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One segment or instance: the pixels equal to `id` in its map."""

    id: int
    """Local id, from 1, unique within its map (over all layers of `inst`)."""
    category_id: int
    """Id in the source data set (sparse); see CategoryTable for contiguous classes."""
    is_thing: bool
    is_crowd: bool
    area: float
    """As the source states it (COCO: the polygon's area), else the number of pixels."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    source_id: int
    """Annotation or segment id in the source data set."""
    map: Literal["seg", "inst"]
    layer: int = 0
    """Layer of `inst`; 0 for `seg`."""
    polygons: tuple[tuple[float, ...], ...] | None = None
    """Rings x, y, x, y, ... in pixels as the source has them; None where its mask is not polygons."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Ground truth of one image at its original size. At least one of the two maps is present."""

    seg: np.ndarray | None
    """[H, W] uint8 or uint16: the panoptic or semantic partition; VOID_ID = unlabelled."""
    inst: np.ndarray | None
    """[Y, H, W] uint8 or uint16: instances in as many layers as their overlaps need; VOID_ID = background."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its annotation, complete and checked, ready to be written to a shard."""

    key: str
    """Unique in the data set; ASCII letters, digits, `_` and `-` only, so that any tar tool groups it rightly."""
    image_id: int
    """Integer id in the source (COCO image id), else the index in the reader's order. Fixes tie order in AP."""
    source: str
    """Where the image came from; named in every error about it."""
    image: bytes
    """The image file's original bytes."""
    image_ext: Literal["jpg", "png"]
    height: int
    width: int
    annotation: Annotation
    left_out: tuple[str, ...] = ()
    """Annotations that cannot be used and are not in `annotation`: which, and why."""
    repairs: tuple[str, ...] = ()
    """What was mended or is doubtful, one entry per case; equal cases are counted in the report."""


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """A sample read back from a shard with its image decoded."""

    key: str
    image_id: int
    source: str
    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    annotation: Annotation
    image_ext: str = "jpg"
    """Ending of the file that the image was stored as."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]
