"""Reader of Pascal VOC segmentation: class maps and object maps with palettes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import is_image_name
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.coco_json import require_unique
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.files import read_bytes, require_file, require_folder, unique_keys
from m2f.data_pipeline.readers.map_reader import MapReader, MapRecord, read_index_map
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import VocSource
from m2f.model.format_count import format_count

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOID = 255
"""Value of borders and difficult regions in both maps."""


def open_voc(source: VocSource, max_pixels: int) -> MapReader:
    """Return the reader of the images in `image_set`, or of all images with a class map. Class 0 is background.

    Raises:
        DataError: no image has both maps, or no image is listed, or one is listed twice.
    """
    images, classes = require_folder(source.images), require_folder(source.class_maps)
    objects = require_folder(source.object_maps)
    names = dict(enumerate(VOC_CLASSES))
    if source.legend is not None:
        names = {category.id: category.name for category in read_legend(source.legend).categories}
    table = CategoryTable(tuple(Category(i, name, i > 0, distinct_color(i)) for i, name in names.items()))
    class_maps, object_maps = (_maps_by_stem(folder) for folder in (classes, objects))
    image_names = [path.name for path in images.iterdir() if is_image_name(path.name)]
    if source.image_set is None:
        stems = sorted(class_maps)
    else:
        require_file(source.image_set)
        lines = read_bytes(Path(source.image_set)).decode("utf-8-sig", errors="replace").splitlines()
        known = {Path(name).stem for name in image_names}  # names may have spaces; class lists append a number
        stems = [text if text in known else text.split()[0] for line in lines if (text := line.strip())]
        require_unique(stems, f"names in {source.image_set}")
    if not stems:
        raise DataError(f"{source.image_set or classes} names no image; check the paths under datasets.<name>.source")
    listed = set(stems)
    names_of_images = [name for name in image_names if Path(name).stem in listed]
    require_unique((Path(name).stem for name in names_of_images), f"names in {images} without their endings")
    files = {Path(name).stem: name for name in names_of_images}
    if not files.keys() & class_maps.keys() & object_maps.keys():
        raise DataError(
            f"none of {format_count(len(stems), 'name')} has an image in {images} and maps in {classes} and {objects}: "
            f"{format_list(stems)}"
        )
    unusable = tuple(
        UnusableAnnotation(source.image_set or str(class_maps[stem]), f"its image {stem}.* is not in {images}")
        for stem in stems
        if stem not in files
    )
    stems = [stem for stem in stems if stem in files]
    keys = unique_keys(files[stem] for stem in stems)
    records = tuple(
        MapRecord(
            i,
            key,
            files[stem],
            (class_maps.get(stem, classes / f"{stem}.png"), object_maps.get(stem, objects / f"{stem}.png")),
        )
        for i, (stem, key) in enumerate(zip(stems, keys, strict=True))
    )
    return MapReader(images, table, VocMaps(table.by_id), records, max_pixels, unusable)


def _maps_by_stem(folder: Path) -> dict[str, Path]:
    """Return the PNG files in a folder by stem; the case of their endings is ignored."""
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() == ".png" and is_image_name(path.name)}


@dataclass(frozen=True)
class VocMaps:
    """Decoder of an image's two maps: the object map separates objects, and the class map gives their classes."""

    categories: Mapping[int, Category]

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each pair of class and object. Thing pixels without an object form a crowd.

        Raises:
            DataError: the maps differ in size, or the class map has 16 bits or an unknown class.
        """
        classes, objects = (read_index_map(path, max_pixels) for path in maps)
        if classes.dtype != np.uint8:
            raise DataError(f"{maps[0]}: class maps have 8 bits, but this map has 16")
        if classes.shape != objects.shape:
            raise DataError(f"{maps[1]} and {maps[0]} differ in size")
        values = classes + 256 * objects.astype(np.uint32)
        return partition(values, self._classify, maps[0], "are classes that the data set does not define")

    def _classify(self, value: int) -> Region | None:
        label, number = value & 255, value >> 8
        if label == _VOID or number == _VOID:
            return None
        category = self.categories[label]
        return Region(category, value if category.is_thing else label, category.is_thing and number == 0)
