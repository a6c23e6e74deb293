"""COCO panoptic data sets, optionally with the instance annotations of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import CocoPanopticSource
from m2f.data_pipeline.errors import DataError, some
from m2f.data_pipeline.json_fields import field, stated_flag
from m2f.data_pipeline.label_space import require_match
from m2f.data_pipeline.partition import find_runs
from m2f.data_pipeline.readers import coco_json
from m2f.data_pipeline.readers.coco_instances import check_annotations
from m2f.data_pipeline.readers.coco_json import CocoImage, stated_area, stated_box, whole_number
from m2f.data_pipeline.readers.files import (
    ANNOTATION_BYTES,
    load_image,
    read_json,
    relative_name,
    require_folder,
    size_on_disk,
    unique_keys,
)
from m2f.data_pipeline.readers.map_reader import read_color_map
from m2f.data_pipeline.readers.masks import disagreements, instance_layers, pixel_box
from m2f.data_pipeline.sample import VOID_ID, Annotation, Sample, Segment, id_dtype

Instances = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PanopticRecord:
    """What the JSON files say about one image."""

    key: str
    image: CocoImage
    mask_name: str
    segments: Sequence[Mapping[str, Any]]
    instances: Instances | None


@dataclass(frozen=True)
class CocoPanopticReader:
    """Images, a JSON with segments, and PNGs whose colours are segment ids."""

    images: Path
    masks: Path
    categories: CategoryTable
    records: tuple[PanopticRecord, ...]
    max_pixels: int

    @classmethod
    def open(cls, source: CocoPanopticSource, max_pixels: int) -> Self:
        """Read and check the annotation files. Raises DataError."""
        return cls.of(read_json(source.panoptic_json), source, max_pixels)

    @classmethod
    def of(cls, document: Any, source: CocoPanopticSource, max_pixels: int) -> Self:
        """Check the content of `source.panoptic_json`. Raises DataError."""
        images, masks = require_folder(source.images), require_folder(source.panoptic_masks)
        path = source.panoptic_json
        coco_json.require_lists(document, ("images", "annotations", "categories"), path)
        categories = coco_json.read_categories(document, path, things_only=False)
        records = _read_records(document, path, images)
        used = Counter(int(s["category_id"]) for record in records for s in record.segments)
        coco_json.require_known_categories(used, categories, path)
        if source.instances_json is not None:
            records = _with_instances(records, categories, source.instances_json, path)
        return cls(images, masks, categories, records, max_pixels)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys in the order of the annotation file."""
        return tuple(record.key for record in self.records)

    def source(self, index: int) -> str:
        """Folder and name of the image."""
        return f"{self.images.name}/{self.records[index].image.file_name}"

    def read(self, index: int) -> Sample:
        """One image with its panoptic map and, where the source has them, its instances in layers."""
        record = self.records[index]
        image = record.image
        file = load_image(self.images / image.file_name, image.height, image.width, self.max_pixels)
        seg, segments = self._read_map(record)
        pixels = np.bincount(seg.ravel(), minlength=len(segments) + 1)[1:].tolist()
        repairs = [*image.repairs, *disagreements(zip((s.area for s in segments), pixels, strict=True))]
        found = None
        if record.instances is not None:
            found = instance_layers(record.instances, image.height, image.width, self.categories, self.source(index))
            segments += found.segments
            repairs += found.repairs
        return Sample(
            key=record.key,
            image_id=image.id,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=image.height,
            width=image.width,
            annotation=Annotation(seg=seg, inst=None if found is None else found.inst, segments=segments),
            left_out=() if found is None else found.left_out,
            repairs=tuple(repairs),
        )

    def size_hint(self, index: int) -> int:
        """Size of the image file plus an allowance for maps."""
        return size_on_disk(self.images / self.records[index].image.file_name) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """A reader of only these images."""
        return replace(self, records=tuple(self.records[i] for i in indices))

    def _read_map(self, record: PanopticRecord) -> tuple[np.ndarray, tuple[Segment, ...]]:
        path = self.masks / record.mask_name
        ids = read_color_map(path, self.max_pixels)
        if ids.shape != (record.image.height, record.image.width):
            raise DataError(
                f"{path}: the mask is {ids.shape[1]} x {ids.shape[0]} pixels, the image "
                f"{record.image.width} x {record.image.height}; they must belong together"
            )
        seg = _local_ids(ids, [int(s["id"]) for s in record.segments], path)
        segments = []
        for local_id, entry in enumerate(record.segments, start=1):
            segments.append(self._segment(entry, seg, local_id, f"{path}: segment {entry['id']}"))
        return seg, tuple(segments)

    def _segment(self, entry: Mapping[str, Any], seg: np.ndarray, local_id: int, where: str) -> Segment:
        category = self.categories.by_id[int(entry["category_id"])]
        area = stated_area(entry, where)
        return Segment(
            id=local_id,
            category_id=category.id,
            is_thing=category.is_thing,
            is_crowd=stated_flag(entry, "iscrowd", where),
            area=float(np.count_nonzero(seg == local_id)) if area is None else area,
            bbox=stated_box(entry, where) or pixel_box(seg == local_id),
            source_id=int(entry["id"]),
            map="seg",
        )


def _read_records(document: Mapping[str, Any], path: str, folder: Path) -> tuple[PanopticRecord, ...]:
    images = coco_json.read_images(document, path, folder)
    keys = unique_keys(image.file_name for image in images)
    groups = coco_json.group_by_image(document, images, path, strict=True)
    wrong = [image_id for image_id, group in groups.items() if len(group) != 1]
    if wrong:
        raise DataError(
            f"{path}: every image needs one entry in `annotations`; these have none or several: {some(wrong)}"
        )
    records = []
    for key, image in zip(keys, images, strict=True):
        entry = groups[image.source_id][0]
        where = f"{path}: annotation of image {image.source_id}"
        segments = coco_json.read_segments(entry, where)
        for segment in segments:
            whole_number(segment, "category_id", where)
            stated_flag(segment, "iscrowd", f"{where}, segment {segment.get('id')}")
        coco_json.require_unique([whole_number(s, "id", where) for s in segments], f"{where}: segment ids")
        mask_name = relative_name(field(entry, "file_name", where), where)
        records.append(PanopticRecord(key, image, mask_name, segments, None))
    return tuple(records)


def _with_instances(
    records: tuple[PanopticRecord, ...], categories: CategoryTable, path: str, panoptic_path: str
) -> tuple[PanopticRecord, ...]:
    """The same records with the instances of another file, which may know more images but not fewer.

    Its category ids are its own: classes are found in the panoptic table by name.
    """
    document = coco_json.read_document(path, ("images", "annotations", "categories"))
    images = {coco_json.id_text(entry, "id", f"{path}: images[{i}]") for i, entry in enumerate(document["images"])}
    missing = {record.image.source_id for record in records} - images
    if missing:
        raise DataError(f"{path} lacks {len(missing)} images of the panoptic annotations: {some(sorted(missing))}")
    groups = coco_json.group_by_image(document, [record.image for record in records], path, strict=False)
    own = coco_json.read_categories(document, path, things_only=True)
    groups = check_annotations(groups, own, path)
    used = {int(entry["category_id"]) for group in groups.values() for entry in group}
    id_of = _ids_by_name([c for c in own.categories if c.id in used], categories, path, panoptic_path)
    if any(own_id != panoptic_id for own_id, panoptic_id in id_of.items()):
        groups = {
            image: [{**entry, "category_id": id_of[int(entry["category_id"])]} for entry in group]
            for image, group in groups.items()
        }
    return tuple(replace(record, instances=groups[record.image.source_id]) for record in records)


def _ids_by_name(used: Sequence[Category], categories: CategoryTable, path: str, panoptic_path: str) -> dict[int, int]:
    """Id in the instance file -> id in the panoptic file, of the classes that instances use.

    Raises DataError where the panoptic file has no thing of that name.
    """
    if not used:
        return {}
    found = require_match(used, categories.categories, path, panoptic_path, ids=False)
    if found.only_first:
        raise DataError(
            f"{path} has instances of {some(found.only_first)}, and {panoptic_path} has no category of that name; give "
            "the same class the same name in both files"
        )
    places = [label for label in found.labels if label is not None]
    return {c.id: categories.categories[place].id for c, place in zip(used, places, strict=True)}


def _local_ids(ids: np.ndarray, source_ids: Sequence[int], path: Path) -> np.ndarray:
    """Renumber source ids [H, W] to 1.. in the order of the JSON; 0 stays void. Raises DataError where they differ."""
    outside = [i for i in source_ids if not 0 < i < 1 << 24]
    if outside:
        raise DataError(f"{path}: segment ids of its JSON entry do not fit a colour: {some(outside)}")
    runs = find_runs(ids)
    values, of_run = np.unique(runs.value, return_inverse=True)
    present = values.tolist()
    local_ids = {0: VOID_ID} | {source_id: number for number, source_id in enumerate(source_ids, start=1)}
    if unknown := [i for i in present if i not in local_ids]:
        raise DataError(f"{path}: pixels have ids that its JSON entry does not list: {some(unknown)}")
    if absent := sorted(set(source_ids).difference(present)):
        raise DataError(f"{path}: its JSON entry lists segments without a pixel: {some(absent)}")
    return runs.paint(np.array([local_ids[i] for i in present], id_dtype(len(source_ids)))[of_run])
