"""The full release of ADE20K (2021): images beside `_seg.png` files that hold class and instance in their colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.ade20k_classes import categories_847
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files, read_color_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import Ade20kFullSource


def open_ade20k_full(source: Ade20kFullSource, max_pixels: int) -> MapReader:
    """Reader of all images under a folder of the release. Raises DataError for images without `_seg.png`."""
    folder = require_folder(source.folder)
    categories = categories_847() if source.categories is None else read_category_file(source.categories, ())[0]
    records = pair_files(folder, folder, image_endings=(".jpg",), map_endings=("_seg.png",), base_names=True)
    return MapReader(folder, categories, ObjectMaps(categories), records, max_pixels)


@dataclass(frozen=True)
class ObjectMaps:
    """Class = 256 * (R div 10) + G, which is `name_ndx` of the JSON beside the image; B tells its instances apart.

    Whole objects only: maps of their parts are other files. Classes outside the table are void.
    """

    categories: CategoryTable

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """A segment per instance and per class of stuff."""
        colors = read_color_map(maps[0], max_pixels)
        classes = (colors & 255) // 10 * 256 + (colors >> 8 & 255)
        # Every value is void or known, so there is nothing to complain about.
        return partition(classes * np.uint32(256) + (colors >> 16), self._classify, maps[0], "")

    def _classify(self, value: int) -> Region | None:
        category = self.categories.by_id.get(value >> 8)
        if category is None:
            return None
        return Region(category, value if category.is_thing else value >> 8 << 8)
