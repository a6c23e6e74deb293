"""Reader of COCO-Stuff pixel maps: 182 classes, both things and stuff, without separate objects."""

from __future__ import annotations

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.partition import Region
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.label_maps import LabelMaps
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files
from m2f.data_pipeline.sources import CocoStuffSource

_LAST_THING = 91
"""Largest id of a thing; all larger ids are stuff."""
_VOID = 255
"""Value of pixels without a class, as in the files of COCO-Stuff."""


def open_coco_stuff(source: CocoStuffSource, max_pixels: int) -> MapReader:
    """Return the reader of `stuffthingmaps`. A pixel value is the class id minus 1.

    Id 0 of labels.txt, `unlabeled`, is not a class; value 255 is void.

    Raises:
        DataError: no image has a map, or labels.txt is invalid.
    """
    images, labels = require_folder(source.images), require_folder(source.labels)
    rows = [row for row in read_legend(source.label_names).categories if row.id > 0]
    categories = CategoryTable(tuple(Category(row.id, row.name, row.id <= _LAST_THING, row.color) for row in rows))
    regions: dict[int, Region | None] = {c.id - 1: Region(c, c.id) for c in categories.categories}
    decoder = LabelMaps(regions | {_VOID: None})
    pairs = pair_files(images, labels)
    return MapReader(images, categories, decoder, pairs.records, max_pixels, pairs.unusable)
