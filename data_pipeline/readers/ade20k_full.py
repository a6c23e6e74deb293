"""Reader of the full release of ADE20K (2021). The colours of `_seg.png` files encode class and instance."""

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
    """Return the reader of all images below a folder of the release.

    Raises:
        DataError: no image has a `_seg.png`, or the categories file is invalid.
    """
    folder = require_folder(source.folder)
    categories = categories_847() if source.categories is None else read_category_file(source.categories, ())[0]
    pairs = pair_files(folder, folder, image_endings=(".jpg",), map_endings=("_seg.png",), base_names=True)
    return MapReader(folder, categories, ObjectMaps(categories), pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class ObjectMaps:
    """Decoder of `_seg.png` files.

    The class index is 256 * (R // 10) + G, which is `name_ndx` in the image's JSON. B is the instance. The maps hold
    whole objects; object parts are in separate files. Classes that are not in the table are void.
    """

    categories: CategoryTable

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each instance and each stuff class."""
        colors = read_color_map(maps[0], max_pixels)
        classes = (colors & 255) // 10 * 256 + (colors >> 8 & 255)
        # Classes outside the table are void, so no value is unknown and the message for unknown values is never used.
        return partition(classes * np.uint32(256) + (colors >> 16), self._classify, maps[0], "")

    def _classify(self, value: int) -> Region | None:
        category = self.categories.by_id.get(value >> 8)
        if category is None:
            return None
        return Region(category, value if category.is_thing else value >> 8 << 8)
