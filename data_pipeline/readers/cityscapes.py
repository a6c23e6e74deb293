"""Readers of Cityscapes: from its instance maps, or from its panoptic JSON.

Class list: https://github.com/mcordts/cityscapesScripts, cityscapesscripts/helpers/labels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import BrokenImageError, read_header
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers import coco_json
from m2f.data_pipeline.readers.coco_panoptic import CocoPanopticReader, PanopticRecord
from m2f.data_pipeline.readers.files import files_below, make_key, read_bytes, require_folder
from m2f.data_pipeline.readers.map_reader import MapReader, pair_files, read_index_map
from m2f.data_pipeline.sample import Annotation
from m2f.data_pipeline.sources import CityscapesPanopticSource, CityscapesSource, CocoPanopticSource
from m2f.model.format_count import format_count

_IMAGE_ENDING = "_leftImg8bit.png"
_MAP_ENDINGS = ("_gtFine_instanceIds.png", "_gtCoarse_instanceIds.png")
_LAST_LABEL = 33
"""Largest label id of Cityscapes (labels.py of cityscapesScripts), including labels that are not evaluated."""
# Label id, name and colour of the 19 evaluated classes, as in labels.py.
_STUFF = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
}
_THINGS = {
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
CATEGORIES = CategoryTable(
    tuple(Category(label, name, label in _THINGS, color) for label, (name, color) in sorted((_STUFF | _THINGS).items()))
)
"""The 19 classes of the benchmark, by label id. Their positions are the train ids."""


def open_cityscapes(source: CityscapesSource, max_pixels: int) -> MapReader:
    """Return the reader of the instance maps, which contain all information of the label maps.

    Raises:
        DataError: a folder is missing, or no image has a map.
    """
    images, annotations = require_folder(source.images), require_folder(source.annotations)
    pairs = pair_files(images, annotations, image_endings=(_IMAGE_ENDING,), map_endings=_MAP_ENDINGS, base_names=True)
    return MapReader(images, CATEGORIES, InstanceIds(), pairs.records, max_pixels, pairs.unusable)


def open_cityscapes_panoptic(source: CityscapesPanopticSource, max_pixels: int) -> CocoPanopticReader:
    """Return the reader of the COCO panoptic format that `createPanopticImgs.py` writes.

    Its JSON names images `<id>_gtFine_leftImg8bit.png`, without the city. The id identifies the real file
    `<city>/<id>_leftImg8bit.png`. A JSON with only `annotations`, as DeepLab2 keeps it, is sufficient.

    Raises:
        DataError: an image is missing, or the JSON cannot be used.
    """
    images, path = require_folder(source.images), source.panoptic_json
    document = coco_json.read_document(path, ("annotations",))
    names = [file.relative_to(images).as_posix() for file in files_below(images, _IMAGE_ENDING)]
    by_id = {PurePosixPath(name).name.removesuffix(_IMAGE_ENDING): name for name in names}
    ids = [coco_json.id_text(entry, "image_id", path) for entry in document["annotations"]]
    missing = [image_id for image_id in ids if image_id not in by_id]
    if missing:
        raise DataError(
            f"{images} lacks {format_count(len(missing), 'image')} of {path}, named <id>{_IMAGE_ENDING}: "
            f"{format_list(missing)}; set source.images to leftImg8bit or to its folder of this split"
        )
    if "images" not in document:
        document["images"] = [_image_entry(image_id, images / by_id[image_id]) for image_id in ids]
    if "categories" not in document:
        document["categories"] = _category_entries(document["annotations"], path)
    reader = CocoPanopticReader.from_document(
        document,
        CocoPanopticSource(images=source.images, panoptic_json=path, panoptic_masks=source.panoptic_masks),
        max_pixels,
    )
    return replace(
        reader, records=tuple(_rename_image(record, by_id[record.image.source_id]) for record in reader.records)
    )


def _image_entry(image_id: str, file: Path) -> dict[str, Any]:
    """Return the entry of an image for `images`, made from its file."""
    try:
        header = read_header(read_bytes(file))
    except BrokenImageError as error:
        raise DataError(f"{file}: {error}") from error
    return {"id": image_id, "file_name": file.name, "height": header.height, "width": header.width}


def _category_entries(annotations: Sequence[Any], path: str) -> list[dict[str, Any]]:
    """Return entries of the 19 classes, with label ids or train ids: the kind that most segments use as category id.

    Segment ids always contain label ids. A comparison with the category ids shows which of the two the file uses.
    """
    segments = [segment for entry in annotations for segment in coco_json.read_segments(entry, path)]
    pairs = [_label_and_category(segment) for segment in segments]
    train_ids = {c.id: train_id for train_id, c in enumerate(CATEGORIES.categories)}
    uses_label_ids = sum(label == category for label, category in pairs) >= sum(
        train_ids.get(label) == category for label, category in pairs
    )
    return [
        {"id": c.id if uses_label_ids else train_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for train_id, c in enumerate(CATEGORIES.categories)
    ]


def _label_and_category(segment: Any) -> tuple[int, int]:
    """Return the label in the id of a segment, and its category id.

    Returns -1 and -2 for an invalid segment, which is left out later.
    """
    try:
        segment_id, category = (
            coco_json.whole_number(segment, "id", ""),
            coco_json.whole_number(segment, "category_id", ""),
        )
    except DataError:
        return -1, -2
    return _label(segment_id), category


def _rename_image(record: PanopticRecord, name: str) -> PanopticRecord:
    """Return the record with the real file name of its image and a key made from the id."""
    key = make_key(f"{record.image.source_id}.png")
    return replace(record, key=key, image=replace(record.image, file_name=name))


@dataclass(frozen=True)
class InstanceIds:
    """Decoder of 16-bit values: a label id, or 1000 times a label id plus the instance number.

    A thing with only a label id is a group of objects that were not separated, and becomes a crowd. Labels outside the
    19 classes are void.
    """

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return one segment for each instance, each group and each stuff class."""
        values = read_index_map(maps[0], max_pixels)
        return partition(values, _classify, maps[0], f"do not belong to a Cityscapes label (0 to {_LAST_LABEL})")


def _classify(value: int) -> Region | None:
    label = _label(value)
    if label > _LAST_LABEL:
        raise KeyError(value)
    category = CATEGORIES.by_id.get(label)
    if category is None:
        return None
    if not category.is_thing:
        return Region(category, label)
    return Region(category, value, is_crowd=value < 1000)


def _label(value: int) -> int:
    return value if value < 1000 else value // 1000
