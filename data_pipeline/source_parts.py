"""Settings that change what a source gives: a part of it, or tiles of its images (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from m2f.model.limits import MEGAPIXELS, PART, PIXELS, Section


@dataclass(frozen=True, kw_only=True)
class PartConfig(Section):
    """A part of a source that has no split of its own; the same images in every run."""

    take: Literal["train", "val"]
    """The part that this data set is; another data set of the same source takes the other one."""
    val_share: Annotated[float, PART] = 0.2
    """Share of the groups that are for validation; at least one group."""
    group: str | None = None
    """Regular expression: images with the same match (its first group, if it has one) at the start of their keys stay
    together, for example `[^_]+`. None: every image is a group."""


@dataclass(frozen=True, kw_only=True)
class TileConfig(Section):
    """Large images are cut into tiles when shards are written; objects are cut at the borders of tiles."""

    above_megapixels: Annotated[float, MEGAPIXELS] = 20.0
    """Images with more than so many 10^6 pixels are cut."""
    side: Annotated[int, PIXELS] = 2048
    """Longest side of a tile. Tiles of an image are nearly equal and do not overlap."""
