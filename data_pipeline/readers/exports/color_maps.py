"""Reader of images and RGB maps whose colours are classes, with a legend (CamVid, CVAT, your own data)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files_with_suffixes, read_color_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import ColorMapSource


def open_color_maps(source: ColorMapSource, max_pixels: int) -> MapReader:
    """Return the reader of the data set.

    Raises:
        DataError: no image has a map, the legend is invalid, or two classes have the same colour.
    """
    images, labels = require_folder(source.images), require_folder(source.labels)
    listed = read_legend(source.legend).categories
    void = {name.lower() for name in source.void}
    regions: dict[int, Region | None] = {}
    for category in listed:
        red, green, blue = category.color
        color = red + 256 * green + 65536 * blue
        if color in regions:
            raise DataError(
                f"{source.legend}: {category.name!r} has the same colour as another class, {category.color}"
            )
        regions[color] = None if category.name.lower() in void else Region(category, category.id)
    categories = CategoryTable(tuple(category for category in listed if category.name.lower() not in void))
    decoder = ColorMaps(regions)
    pairs = pair_files_with_suffixes(images, labels, source.image_suffix, source.suffix)
    return MapReader(images, categories, decoder, pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class ColorMaps:
    """Decoder of colour maps. Each class in an image becomes one segment."""

    regions: Mapping[int, Region | None]
    """Region by R + 256 G + 65536 B; None for void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each class in the map."""
        return partition(
            read_color_map(maps[0], max_pixels), self._classify, maps[0], "(R, G, B) are not in the legend; add them"
        )

    def _classify(self, value: int) -> Region | None:
        if value not in self.regions:
            raise KeyError((value & 255, value >> 8 & 255, value >> 16))
        return self.regions[value]
