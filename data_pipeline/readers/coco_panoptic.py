"""Reader of COCO panoptic data sets, optionally with instance annotations of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.json_fields import field, optional_flag
from m2f.data_pipeline.label_space import require_match
from m2f.data_pipeline.partition import find_runs
from m2f.data_pipeline.readers import coco_json
from m2f.data_pipeline.readers.coco_instances import check_annotations
from m2f.data_pipeline.readers.coco_json import CocoImage, optional_area, optional_box, whole_number
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
from m2f.data_pipeline.readers.masks import area_mismatches, instance_layers, pixel_box
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import VOID_ID, Annotation, Sample, Segment, id_dtype
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.model.format_count import format_count

Instances = Sequence[Mapping[str, Any]]
"""COCO instance annotations of one image."""


@dataclass(frozen=True)
class PanopticRecord:
    """Annotations of one image from the JSON files."""

    key: str
    image: CocoImage
    mask_name: str
    """Path of the map relative to the folder of maps."""
    segments: Sequence[Mapping[str, Any]]
    """Usable entries of `segments_info`."""
    instances: Instances | None
    """Instances of the second file; None if the source has no such file."""
    unusable_ids: frozenset[int] = frozenset()
    """Ids of segments that are left out. Their pixels are void."""


@dataclass(frozen=True)
class CocoPanopticReader:
    """Reader of images, a JSON file with segments, and PNGs whose colours are segment ids."""

    images: Path
    masks: Path
    categories: CategoryTable
    records: tuple[PanopticRecord, ...]
    max_pixels: int
    unusable: tuple[UnusableAnnotation, ...] = ()

    @classmethod
    def open(cls, source: CocoPanopticSource, max_pixels: int) -> Self:
        """Read and check the annotation files. Raises DataError if a whole file is unusable.

        Single unusable annotations are left out and listed in `unusable`.
        """
        return cls.from_document(read_json(source.panoptic_json), source, max_pixels)

    @classmethod
    def from_document(cls, document: Any, source: CocoPanopticSource, max_pixels: int) -> Self:
        """Build a reader from the content of `source.panoptic_json`. Raises DataError if it is unusable."""
        images, masks = require_folder(source.images), require_folder(source.panoptic_masks)
        path = source.panoptic_json
        coco_json.require_lists(document, ("images", "annotations", "categories"), path)
        categories = coco_json.read_categories(document, path, things_only=False)
        records, unusable = _read_records(document, path, images, categories)
        if source.instances_json is not None:
            records, unusable_instances = _with_instances(records, categories, source.instances_json, path)
            unusable += unusable_instances
        return cls(images, masks, categories, records, max_pixels, tuple(unusable))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys in the order of the annotation file."""
        return tuple(record.key for record in self.records)

    def source(self, index: int) -> str:
        """Return the image's location for messages, as `folder/file name`."""
        return f"{self.images.name}/{self.records[index].image.file_name}"

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the files of the image and of its panoptic map."""
        record = self.records[index]
        return self.images / record.image.file_name, self.masks / record.mask_name

    def read(self, index: int) -> Sample:
        """Read one image with its panoptic map and, if the source has them, its instances in layers."""
        record = self.records[index]
        image = record.image
        file = load_image(self.images / image.file_name, image.height, image.width, self.max_pixels)
        seg, segments, left_out = self._read_map(record)
        pixels = np.bincount(seg.ravel(), minlength=len(segments) + 1)[1:].tolist()
        repairs = [
            *image.repairs,
            *file.repairs,
            *area_mismatches(zip((s.area for s in segments), pixels, strict=True)),
        ]
        # Panoptic quality divides by the area, so a stated 0 would make it wrong.
        segments = tuple(replace(s, area=s.area or float(n)) for s, n in zip(segments, pixels, strict=True))
        layers = None
        if record.instances is not None:
            layers = instance_layers(record.instances, image.height, image.width, self.categories, self.source(index))
            segments += layers.segments
            repairs += layers.repairs
        return Sample(
            key=record.key,
            image_id=image.id,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=image.height,
            width=image.width,
            annotation=Annotation(seg=seg, inst=None if layers is None else layers.inst, segments=segments),
            left_out=(*left_out, *(() if layers is None else layers.left_out)),
            repairs=tuple(repairs),
        )

    def size_hint(self, index: int) -> int:
        """Return the size of the image file plus an estimate for maps, in bytes."""
        return size_on_disk(self.images / self.records[index].image.file_name) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given images, in the given order."""
        return replace(self, records=tuple(self.records[i] for i in indices), unusable=())

    def _read_map(self, record: PanopticRecord) -> tuple[np.ndarray, tuple[Segment, ...], list[str]]:
        """Return the map [H, W] of local ids, its segments, and one message per fault.

        Segments that cannot be used and ids that are not listed are faults; their pixels become void.

        Raises:
            DataError: the map cannot be read, or differs from the image in size.
        """
        path = self.masks / record.mask_name
        ids = read_color_map(path, self.max_pixels)
        if ids.shape != (record.image.height, record.image.width):
            raise DataError(
                f"{path}: the mask is {ids.shape[1]} x {ids.shape[0]} pixels, but the image is "
                f"{record.image.width} x {record.image.height}; check that they match"
            )
        runs = find_runs(ids)
        values, value_index = np.unique(runs.value, return_inverse=True)
        present = set(values.tolist())
        usable, left_out = [], []
        for entry in record.segments:
            where = f"{path}: segment {entry['id']}"
            try:
                optional_area(entry, where)
                optional_box(entry, where)
                if int(entry["id"]) not in present:
                    raise DataError(f"{where} is in its JSON entry but has no pixel")
                usable.append(entry)
            except DataError as error:
                left_out.append(str(error))
        listed = {VOID_ID, *(int(entry["id"]) for entry in record.segments)} | record.unusable_ids
        if unknown := sorted(present - listed):
            left_out.append(f"{path}: pixels have ids that its JSON entry does not list: {format_list(unknown)}")
        local_ids = {int(entry["id"]): number for number, entry in enumerate(usable, start=1)}
        local_id_by_value = np.array([local_ids.get(i, VOID_ID) for i in values.tolist()], id_dtype(len(usable)))
        seg = runs.paint(local_id_by_value[value_index])
        segments = (self._segment(entry, seg, number, path) for number, entry in enumerate(usable, start=1))
        return seg, tuple(segments), left_out

    def _segment(self, entry: Mapping[str, Any], seg: np.ndarray, local_id: int, path: Path) -> Segment:
        where = f"{path}: segment {entry['id']}"
        category = self.categories.by_id[int(entry["category_id"])]
        area = optional_area(entry, where)
        return Segment(
            id=local_id,
            category_id=category.id,
            is_thing=category.is_thing,
            is_crowd=optional_flag(entry, "iscrowd", where),
            area=float(np.count_nonzero(seg == local_id)) if area is None else area,
            bbox=optional_box(entry, where) or pixel_box(seg == local_id),
            source_id=int(entry["id"]),
            map="seg",
        )


def _read_records(
    document: Mapping[str, Any], path: str, folder: Path, categories: CategoryTable
) -> tuple[tuple[PanopticRecord, ...], list[UnusableAnnotation]]:
    images = coco_json.read_images(document, path, folder)
    keys = unique_keys(image.file_name for image in images)
    groups, unusable = coco_json.group_by_image(document, (image.source_id for image in images), path)
    mismatched = [image_id for image_id, group in groups.items() if len(group) != 1]
    if mismatched:
        raise DataError(
            f"{path}: every image needs exactly one entry in `annotations`; these have none or several: "
            f"{format_list(mismatched)}"
        )
    records = []
    for key, image in zip(keys, images, strict=True):
        entry = groups[image.source_id][0]
        where = f"{path}: annotation of image {image.source_id}"
        segments, problems, unusable_ids = _usable_segments(coco_json.read_segments(entry, where), categories)
        name = f"annotation of image {image.source_id}"
        unusable += [UnusableAnnotation(path, f"{name}, {problem}") for problem in problems]
        mask_name = relative_name(field(entry, "file_name", where), where)
        records.append(PanopticRecord(key, image, mask_name, segments, None, unusable_ids))
    return tuple(records), unusable


def _usable_segments(
    entries: Sequence[Any], categories: CategoryTable
) -> tuple[list[Mapping[str, Any]], list[str], frozenset[int]]:
    """Return the usable segments, a message for each unusable one, and the valid ids among the unusable ones."""
    usable, problems, unusable_ids = [], [], set()
    segment_ids = [_parse_segment_id(entry) for entry in entries]
    count = Counter(segment_ids)
    for number, (entry, segment_id) in enumerate(zip(entries, segment_ids, strict=True)):
        where = f"segments_info[{number}]" if segment_id is None else f"segment {segment_id}"
        try:
            coco_json.require_category(entry, categories, where)
            optional_flag(entry, "iscrowd", where)
            if segment_id is None:
                raise DataError(f"{where}: id is {repr(entry.get('id'))[:40]}, not a whole number from 1 to 16777215")
            if count[segment_id] > 1:
                raise DataError(f"{where}: {count[segment_id]} segments have this id")
            usable.append(entry)
        except DataError as error:
            problems.append(str(error))
            unusable_ids |= set() if segment_id is None else {segment_id}
    return usable, problems, frozenset(unusable_ids)


def _parse_segment_id(entry: Any) -> int | None:
    """Return the id of a segment; None if it is not an integer from 1 to 2^24 - 1, the range of RGB colours."""
    try:
        segment_id = whole_number(entry, "id", "")
    except DataError:
        return None
    return segment_id if 0 < segment_id < 1 << 24 else None


def _with_instances(
    records: tuple[PanopticRecord, ...], categories: CategoryTable, path: str, panoptic_path: str
) -> tuple[tuple[PanopticRecord, ...], list[UnusableAnnotation]]:
    """Return the records with the instances of the file `path`, and the unusable annotations of that file.

    The file must list all images of the records and may list more. Its category ids may differ, because classes are
    matched with the panoptic table by name.

    Raises:
        DataError: images are missing, the file is unusable, or a class is not in the panoptic table.
    """
    document = coco_json.read_document(path, ("images", "annotations", "categories"))
    images = {coco_json.id_text(entry, "id", f"{path}: images[{i}]") for i, entry in enumerate(document["images"])}
    missing = {record.image.source_id for record in records} - images
    if missing:
        raise DataError(
            f"{path} lacks {format_count(len(missing), 'image')} of the panoptic annotations: "
            f"{format_list(sorted(missing))}; set source.instances_json to the file of the same images, or leave it out"
        )
    by_image, unlisted = coco_json.group_by_image(document, images, path)
    by_image = {record.image.source_id: by_image[record.image.source_id] for record in records}
    instance_categories = coco_json.read_categories(document, path, things_only=True)
    groups, unusable = check_annotations(by_image, instance_categories, path)
    used = {int(entry["category_id"]) for group in groups.values() for entry in group}
    panoptic_ids = _ids_by_name(
        [c for c in instance_categories.categories if c.id in used], categories, path, panoptic_path
    )
    if any(instance_id != panoptic_id for instance_id, panoptic_id in panoptic_ids.items()):
        groups = {
            image: [{**entry, "category_id": panoptic_ids[int(entry["category_id"])]} for entry in group]
            for image, group in groups.items()
        }
    with_instances = (replace(record, instances=groups[record.image.source_id]) for record in records)
    return tuple(with_instances), [*unlisted, *unusable]


def _ids_by_name(used: Sequence[Category], categories: CategoryTable, path: str, panoptic_path: str) -> dict[int, int]:
    """Map category ids of the instance file to those of the panoptic file, for the classes in `used`.

    Raises:
        DataError: the panoptic file lacks the name of a class, or the two files contradict each other.
    """
    if not used:
        return {}
    match = require_match(used, categories.categories, path, panoptic_path, ids=False)
    if match.only_first:
        raise DataError(
            f"{path} has instances of {format_list(match.only_first)}, but {panoptic_path} has no category of that "
            "name; give the same class the same name in both files"
        )
    indices = [label for label in match.labels if label is not None]
    return {c.id: categories.categories[index].id for c, index in zip(used, indices, strict=True)}
