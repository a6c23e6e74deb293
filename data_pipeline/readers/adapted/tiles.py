"""Cut large images into tiles. Each tile is a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import decode_rgb, encode_png, frame_orientation, read_header
from m2f.data_pipeline.readers.files import displayed_size, make_key
from m2f.data_pipeline.readers.masks import pixel_box
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation, Sample, Segment, id_dtype
from m2f.data_pipeline.source_parts import TileConfig

if TYPE_CHECKING:
    from m2f.data_pipeline.readers import Reader


class Tile(NamedTuple):
    """A part of an image, or a whole image."""

    index: int
    """Position in the whole data set, which is the image id."""
    key: str
    image: int
    """Position of the image in the wrapped reader."""
    window: tuple[int, int, int, int] | None
    """Top, left, bottom and right in pixels of the image as viewers show it; None for the whole image."""
    size: tuple[int, int]
    """Height and width of the image as viewers show it; zeros if unknown."""


@dataclass(frozen=True)
class TileReader:
    """Wraps a reader and cuts images above a size into tiles. Each tile decodes its image again."""

    reader: Any
    tiles: tuple[Tile, ...]

    @classmethod
    def open(cls, reader: Reader, config: TileConfig) -> Self:
        """Wrap a reader. Reads the header of each image for its size.

        Raises:
            DataError: the key of a tile is also the key of another sample.
        """
        tiles: list[Tile] = []
        for image, key in enumerate(reader.keys):
            files = reader.files(image)
            height, width = displayed_size(files[0]) if files else (0, 0)
            if height * width <= config.above_megapixels * 1e6:
                tiles.append(Tile(len(tiles), key, image, None, (height, width)))
                continue
            for top, bottom in _split_length(height, config.side):
                for left, right in _split_length(width, config.side):
                    name = make_key(f"{key}_y{top}_x{left}")
                    window = top, left, bottom, right
                    tiles.append(Tile(len(tiles), name, image, window, (height, width)))
        if len({tile.key for tile in tiles}) < len(tiles):
            raise DataError("keys of tiles (NAME_yTOP_xLEFT) collide with names of other images; rename these images")
        return cls(reader, tuple(tiles))

    @property
    def categories(self) -> CategoryTable:
        """Return the value of the wrapped reader."""
        return self.reader.categories

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys. Keys of tiles are NAME_yTOP_xLEFT, row by row from the top left."""
        return tuple(tile.key for tile in self.tiles)

    @property
    def unusable(self) -> Sequence[UnusableAnnotation]:
        """Return the value of the wrapped reader."""
        return self.reader.unusable

    def source(self, index: int) -> str:
        """Return the origin of the image and the position of the tile."""
        tile = self.tiles[index]
        location = "" if tile.window is None else f" (tile at x {tile.window[1]}, y {tile.window[0]})"
        return f"{self.reader.source(tile.image)}{location}"

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the files of the whole image."""
        return self.reader.files(self.tiles[index].image)

    def size_hint(self, index: int) -> int:
        """Return the approximate size of a tile in bytes: 2 bytes per pixel, as PNG."""
        window = self.tiles[index].window
        if window is None:
            return self.reader.size_hint(self.tiles[index].image)
        return (window[2] - window[0]) * (window[3] - window[1]) * 2

    def read(self, index: int) -> Sample:
        """Read one tile as PNG, with objects cut at its border. An image that is not cut keeps its file."""
        tile = self.tiles[index]
        sample = self.reader.read(tile.image)
        common = {"key": tile.key, "image_id": tile.index, "source": self.source(index)}
        if tile.window is None:
            return replace(sample, **common)
        top, left, bottom, right = tile.window
        if (sample.height, sample.width) != tile.size:  # the annotation fits the stored image, which viewers turn
            top, left, bottom, right = left, top, right, bottom
        orientation = frame_orientation(read_header(sample.image), sample.height, sample.width)
        pixels = decode_rgb(sample.image, orientation)[top:bottom, left:right]
        is_first = top == left == 0  # count left-out and repaired annotations once per image
        return replace(
            sample,
            **common,
            image=encode_png(pixels),
            image_ext="png",
            height=bottom - top,
            width=right - left,
            annotation=crop_annotation(sample.annotation, (top, left, bottom, right)),
            left_out=sample.left_out if is_first else (),
            repairs=sample.repairs if is_first else (),
        )

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given tiles, in the given order."""
        chosen = [self.tiles[i] for i in indices]
        images = sorted({tile.image for tile in chosen})
        new_index = {image: i for i, image in enumerate(images)}
        tiles = tuple(tile._replace(image=new_index[tile.image]) for tile in chosen)
        return replace(self, reader=self.reader.subset(images), tiles=tiles)


def _split_length(length: int, side: int) -> list[tuple[int, int]]:
    """Divide a length into nearly equal intervals of at most `side` pixels."""
    count = math.ceil(length / side)
    ends = [length * i // count for i in range(count + 1)]
    return list(pairwise(ends))


def crop_annotation(annotation: Annotation, window: tuple[int, int, int, int]) -> Annotation:
    """Return the annotation within a window (top, left, bottom, right).

    Segments get new ids. Their areas and boxes are computed from the remaining pixels. Polygons are dropped.
    """
    top, left, bottom, right = window
    segments: list[Segment] = []
    seg = inst = None
    if annotation.seg is not None:
        seg, kept = _crop_layers(annotation.seg[None, top:bottom, left:right], annotation.segments, "seg")
        seg = seg[0]
        segments += kept
    if annotation.inst is not None:
        inst, kept = _crop_layers(annotation.inst[:, top:bottom, left:right], annotation.segments, "inst")
        segments += kept
    return Annotation(seg=seg, inst=inst, segments=tuple(segments))


def _crop_layers(layers: np.ndarray, segments: Sequence[Segment], name: str) -> tuple[np.ndarray, list[Segment]]:
    """Return the used layers [Y, h, w] with new ids, and the segments that still have a pixel."""
    kept: list[Segment] = []
    map_segments = [segment for segment in segments if segment.map == name]
    pixels = np.bincount(layers.ravel(), minlength=1 + max((segment.id for segment in map_segments), default=0))
    new_ids = np.zeros(len(pixels), np.uint32)
    used = sorted({segment.layer for segment in map_segments if pixels[segment.id]}) or [0]
    for segment in map_segments:
        if not pixels[segment.id]:
            continue
        new_ids[segment.id] = len(kept) + 1
        x, y, w, h = pixel_box(layers[segment.layer] == segment.id)
        box = (float(x), float(y), float(w), float(h))
        area, layer = float(pixels[segment.id]), used.index(segment.layer)
        kept.append(replace(segment, id=len(kept) + 1, area=area, bbox=box, layer=layer, polygons=None))
    return new_ids.astype(id_dtype(len(kept)))[layers[used]], kept
