"""Reader of ADE20K in the layout of the 2016 challenge: 150 classes, 100 of them things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150
from m2f.data_pipeline.readers.files import require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files, read_color_map, read_index_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import Ade20kSource

_UNKNOWN = "are not classes of the challenge (labels 0 to 150, instances 1 to 100)"
_THINGS = CATEGORIES_150.for_task("instance")
"""The 100 things in the order of the 150 classes. Instance maps number them from 1."""
_IS_STUFF = np.array([not (c := CATEGORIES_150.by_id.get(value)) or not c.is_thing for value in range(256)])
"""[256] bool by label: False for things, which instance maps contain; True for void, stuff and unknown labels."""


def open_ade20k(source: Ade20kSource, max_pixels: int) -> MapReader:
    """Return the reader of the data set: panoptic if `instances` is given, otherwise semantic.

    Raises:
        DataError: a folder is missing, or no image has a map.
    """
    images = require_folder(source.images)
    folders = [require_folder(f) for f in (source.annotations, source.instances) if f is not None]
    decoder = SemanticMaps() if source.instances is None else PanopticMaps()
    pairs = pair_files(images, *folders)
    return MapReader(images, CATEGORIES_150, decoder, pairs.records, max_pixels, pairs.unusable)


@dataclass(frozen=True)
class SemanticMaps:
    """Decoder of label maps with the labels 1 to 150; 0 is void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each class in the map."""
        return partition(read_index_map(maps[0], max_pixels), _classify_label, maps[0], _UNKNOWN)


@dataclass(frozen=True)
class PanopticMaps:
    """Decoder of a label map and an instance map (red: thing class from 1 to 100; green: instance number, 0 = none).

    Both are merged as in the official preparation (facebookresearch/Mask2Former, datasets/prepare_ade20k_pan_seg.py).
    Stuff comes from the label map and things from the instance map, which has priority. Pixels of a thing in the label
    map without an instance are void.
    """

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each instance and each stuff class."""
        labels, colors = read_index_map(maps[0], max_pixels), read_color_map(maps[1], max_pixels)
        if labels.shape != colors.shape:
            raise DataError(
                f"{maps[1]}: the instance map is {colors.shape[1]} x {colors.shape[0]} pixels, but the label map is "
                f"{labels.shape[1]} x {labels.shape[0]}; check that they match"
            )
        if labels.dtype != np.uint8:
            raise DataError(f"{maps[0]}: label maps of the challenge have 8 bits, but this one has 16")
        stuff = np.where(_IS_STUFF[labels], labels, 0)
        has_instance = (colors >> 8 & 255) != 0
        return partition(np.where(has_instance, colors & 0xFFFF, stuff), _classify, maps[1], _UNKNOWN)


def _classify(value: int) -> Region | None:
    thing, number = value & 255, value >> 8
    if not number:
        return _classify_label(value)
    if not 1 <= thing <= len(_THINGS):
        raise KeyError(f"red {thing}, green {number}")
    return Region(_THINGS[thing - 1], value)


def _classify_label(value: int) -> Region | None:
    if value == 0:
        return None
    category = CATEGORIES_150.by_id[value]
    return Region(category, value)
