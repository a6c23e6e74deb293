"""ADE20K in the layout of the 2016 challenge: 150 classes, of which 100 are things."""

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

_UNKNOWN = "are no classes of the challenge (labels 0 to 150, instances 1 to 100)"
_THINGS = CATEGORIES_150.for_task("instance")
"""The instance maps number the 100 things from 1, in the order of the 150 classes."""
_IS_STUFF = np.array([not (c := CATEGORIES_150.by_id.get(value)) or not c.is_thing for value in range(256)])
"""[256] bool by label: void and stuff, which the instance maps do not number."""


def open_ade20k(source: Ade20kSource, max_pixels: int) -> MapReader:
    """Reader of the set, panoptic where `instances` are given, else semantic. Raises DataError for missing files."""
    images = require_folder(source.images)
    folders = [require_folder(f) for f in (source.annotations, source.instances) if f is not None]
    decoder = SemanticMaps() if source.instances is None else PanopticMaps()
    return MapReader(images, CATEGORIES_150, decoder, pair_files(images, *folders), max_pixels)


@dataclass(frozen=True)
class SemanticMaps:
    """Values 1 to 150; 0 is void."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """A segment per class present."""
        return partition(read_index_map(maps[0], max_pixels), _classify_label, maps[0], _UNKNOWN)


@dataclass(frozen=True)
class PanopticMaps:
    """Label map and instance map (red: thing class from 1 to 100, green: number of the instance, 0 = none).

    Joined as the official preparation does (facebookresearch/Mask2Former, datasets/prepare_ade20k_pan_seg.py): stuff
    comes from the label map, things from the instance map, which wins where both claim a pixel. Pixels that the label
    map gives to a thing and the instance map to no instance are void.
    """

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """A segment per instance and per class of stuff."""
        labels, colors = read_index_map(maps[0], max_pixels), read_color_map(maps[1], max_pixels)
        if labels.shape != colors.shape:
            raise DataError(
                f"{maps[1]}: the instance map is {colors.shape[1]} x {colors.shape[0]} pixels, the label map "
                f"{labels.shape[1]} x {labels.shape[0]}; they must belong together"
            )
        if labels.dtype != np.uint8:
            raise DataError(f"{maps[0]}: label maps of the challenge have 8 bits, this one has 16")
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
