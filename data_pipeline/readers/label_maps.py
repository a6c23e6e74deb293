"""Reader of images and class maps with the same file stems (CamVid, Pascal VOC, your own data)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files_with_suffixes, read_index_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import LabelMapSource


def open_label_maps(source: LabelMapSource, max_pixels: int) -> MapReader:
    """Return the reader of the data set.

    Raises:
        DataError: no image has a map, or the categories file is invalid.
    """
    images, labels = require_folder(source.images), require_folder(source.labels)
    categories, void = read_category_file(source.categories, source.void, things=False)
    regions: dict[int, Region | None] = {c.id: Region(c, c.id) for c in categories.categories}
    decoder = LabelMaps(regions | dict.fromkeys(void))
    pairs = pair_files_with_suffixes(images, labels, source.image_suffix, source.suffix)
    return MapReader(images, categories, decoder, pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class LabelMaps:
    """Decoder of class maps. Each class in an image becomes one segment, for stuff and things alike."""

    regions: Mapping[int, Region | None]
    """Region by pixel value; None for void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each class in the map."""
        return partition(
            read_index_map(maps[0], max_pixels),
            self.regions.__getitem__,
            maps[0],
            "are neither categories nor void; add them to the categories file or to source.void",
        )
