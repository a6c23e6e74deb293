"""Reader of the instance maps of Mapillary Vistas 1.2 and 2.0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.json_fields import field, read_flag
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.coco_json import read_color
from m2f.data_pipeline.readers.files import read_json, require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files, read_index_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import MapillarySource


def open_mapillary(source: MapillarySource, max_pixels: int) -> MapReader:
    """Return the reader of the data set.

    Raises:
        DataError: no image has a map, or the config file is invalid.
    """
    images, instances = require_folder(source.images), require_folder(source.instances)
    labels = _read_labels(source.config_json)
    categories = CategoryTable(tuple(category for category in labels if category is not None))
    pairs = pair_files(images, instances)
    return MapReader(images, categories, InstanceMaps(labels), pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class InstanceMaps:
    """Decoder of 16-bit values: 256 times the position of the label in the config file plus the instance number."""

    labels: tuple[Category | None, ...]
    """Category by position in the config file. Labels that are not evaluated are void (None)."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each instance and each stuff class. The maps do not mark crowds.

        Raises:
            DataError: the map has 8 bits, or a label that the config file does not list.
        """
        last = len(self.labels) - 1
        values = read_index_map(maps[0], max_pixels)
        if values.dtype != np.uint16:  # every value would be an instance of the first label
            raise DataError(f"{maps[0]}: instance maps have 16 bits, but this map has 8; use the folder `instances`")
        return partition(
            values,
            self._classify,
            maps[0],
            f"(256 x label + instance) do not belong to a label of the config file (0 to {last}); use the instances "
            "folder (16 bits) and the config file of the same version",
        )

    def _classify(self, value: int) -> Region | None:
        label = value >> 8
        if label >= len(self.labels):
            raise KeyError(value)
        category = self.labels[label]
        if category is None:
            return None
        return Region(category, value if category.is_thing else label << 8)


def _read_labels(path: str) -> tuple[Category | None, ...]:
    """Return the labels of a config file by position. Version 1.2 evaluates 65 of 66, all except `void--unlabeled`."""
    document = read_json(path)
    entries = document.get("labels") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= 256:
        raise DataError(f"{path} has no list of up to 256 labels; it is not a config file of Mapillary Vistas")
    labels: list[Category | None] = []
    for number, entry in enumerate(entries):
        where = f"{path}: labels[{number}]"
        is_thing, is_evaluated = (read_flag(entry, flag, where) for flag in ("instances", "evaluate"))
        name = str(entry.get("readable") or field(entry, "name", where))
        labels.append(Category(number, name, is_thing, read_color(entry, number, where)) if is_evaluated else None)
    if not any(labels):
        raise DataError(f"{path}: no label has `evaluate` true, so there is no class to learn")
    return tuple(labels)
