"""Folders of images and class maps with the same stems (CamVid, Pascal VOC, own data)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import OTHER_MAP_ENDINGS, MapReader, pair_files, read_index_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import LabelMapSource


def open_label_maps(source: LabelMapSource, max_pixels: int) -> MapReader:
    """Reader of the set. Raises DataError for files without a partner and faults of the categories file."""
    images, labels = require_folder(source.images), require_folder(source.labels)
    categories, void = read_category_file(source.categories, source.void, things=False)
    regions: dict[int, Region | None] = {c.id: Region(c, c.id) for c in categories.categories}
    decoder = LabelMaps(regions | dict.fromkeys(void))
    endings = tuple(source.suffix + ending for ending in (".png", *OTHER_MAP_ENDINGS))
    records = pair_files(images, labels, map_endings=endings[:1], other_map_endings=endings[1:])
    return MapReader(images, categories, decoder, records, max_pixels)


@dataclass(frozen=True)
class LabelMaps:
    """Every class that is present in an image becomes one segment, stuff and things alike."""

    regions: Mapping[int, Region | None]
    """By pixel value; None for void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """A segment per class present."""
        return partition(
            read_index_map(maps[0], max_pixels),
            self.regions.__getitem__,
            maps[0],
            "are neither categories nor void; add them to the categories file or to source.void",
        )
