"""Settings that select a part of a source or cut its images into tiles (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from m2f.model.limits import MEGAPIXELS, PIXELS, SHARE_ABOVE_0, Section


@dataclass(frozen=True, kw_only=True)
class PartConfig(Section):
    """Training or validation part of a source without a split. Every run selects the same images."""

    take: Literal["train", "val"]
    """Part of the source that this data set uses. A second data set of the same source can use the other part."""
    val_share: Annotated[float, SHARE_ABOVE_0] = 0.2
    """Share of the groups used for validation; at least one group."""
    group: str | None = None
    """Regular expression matched at the start of each key, for example `[^_]+`. Images with the same match stay in one
    part; if the expression has a group, its first group is compared. None makes every image a group."""


@dataclass(frozen=True, kw_only=True)
class TileConfig(Section):
    """Tiling of large images when shards are written. Objects are cut at tile borders."""

    above_megapixels: Annotated[float, MEGAPIXELS] = 20.0
    """Images with more megapixels (10^6 pixels) than this are cut into tiles."""
    side: Annotated[int, PIXELS] = 2048
    """Longest side of a tile in pixels. The tiles of an image have nearly equal sizes and do not overlap."""
