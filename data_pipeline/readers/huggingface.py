"""Reader of images and three-channel maps, the format of Hugging Face's instance segmentation examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import OTHER_MAP_ENDINGS, MapReader, pair_files, read_color_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import HuggingFaceSource


def open_huggingface(source: HuggingFaceSource, max_pixels: int) -> MapReader:
    """Return the reader of the data set.

    Raises:
        DataError: no image has a map, or the categories file is invalid.
    """
    images, annotations = require_folder(source.images), require_folder(source.annotations)
    categories, void = read_category_file(source.categories, source.void, things=True)
    decoder = ClassAndInstanceMaps(categories.by_id | dict.fromkeys(void))
    pairs = pair_files(images, annotations, other_map_endings=OTHER_MAP_ENDINGS)
    return MapReader(images, categories, decoder, pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class ClassAndInstanceMaps:
    """Decoder of maps in which red is the class, and green + 256 x blue is the instance number.

    Blue is 0 for up to 255 instances. Each pair of a thing class and a number is one instance. Instance numbers of
    stuff are ignored.
    """

    categories: Mapping[int, Category | None]
    """Category by class; None for void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each instance and each stuff class."""
        return partition(
            read_color_map(maps[0], max_pixels),
            self._classify,
            maps[0],
            "of the red channel are neither categories nor void; add them to the categories file or to source.void",
        )

    def _classify(self, value: int) -> Region | None:
        category = self.categories[value & 255]
        if category is None:
            return None
        return Region(category, value if category.is_thing else category.id)
