"""Reader of COCO instance data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.json_fields import optional_flag
from m2f.data_pipeline.readers import coco_json
from m2f.data_pipeline.readers.coco_json import CocoImage
from m2f.data_pipeline.readers.files import (
    ANNOTATION_BYTES,
    load_image,
    make_key,
    require_folder,
    size_on_disk,
    unique_keys,
)
from m2f.data_pipeline.readers.masks import instance_layers
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation, Sample
from m2f.data_pipeline.sources import CocoInstancesSource


@dataclass(frozen=True)
class CocoInstancesReader:
    """Reader of images with polygons or RLE masks, which may overlap. Images without annotations are kept."""

    images: Path
    categories: CategoryTable
    records: tuple[tuple[CocoImage, Sequence[Mapping[str, Any]]], ...]
    """Images with their annotations."""
    max_pixels: int
    unusable: tuple[UnusableAnnotation, ...] = ()

    @classmethod
    def open(cls, source: CocoInstancesSource, max_pixels: int) -> Self:
        """Read and check the annotation file.

        Raises DataError if the whole file is unusable. Single unusable annotations are left out and listed in
        `unusable`.
        """
        folder = require_folder(source.images)
        path = source.instances_json
        document = coco_json.read_document(path, ("images", "annotations", "categories"))
        images = coco_json.read_images(document, path, folder)
        unique_keys(image.file_name for image in images)
        categories = coco_json.read_categories(document, path, things_only=True)
        by_image, unlisted = coco_json.group_by_image(document, (image.source_id for image in images), path)
        groups, unusable = check_annotations(by_image, categories, path)
        if source.crowds_are_objects:
            groups = {image: [{**entry, "iscrowd": 0} for entry in group] for image, group in groups.items()}
        records = tuple((image, groups[image.source_id]) for image in images)
        return cls(folder, categories, records, max_pixels, (*unlisted, *unusable))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys in the order of the annotation file."""
        return tuple(make_key(image.file_name) for image, _ in self.records)

    def source(self, index: int) -> str:
        """Return the image's location for messages, as `folder/file name`."""
        return f"{self.images.name}/{self.records[index][0].file_name}"

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the image file. Annotations come from the JSON file."""
        return (self.images / self.records[index][0].file_name,)

    def read(self, index: int) -> Sample:
        """Read one image with its instances in layers. Raises DataError if the image is unusable."""
        image, annotations = self.records[index]
        file = load_image(self.images / image.file_name, image.height, image.width, self.max_pixels)
        layers = instance_layers(annotations, image.height, image.width, self.categories, self.source(index))
        return Sample(
            key=self.keys[index],
            image_id=image.id,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=image.height,
            width=image.width,
            annotation=Annotation(seg=None, inst=layers.inst, segments=layers.segments),
            left_out=layers.left_out,
            repairs=image.repairs + file.repairs + layers.repairs,
        )

    def size_hint(self, index: int) -> int:
        """Return the size of the image file plus an estimate for masks, in bytes."""
        return size_on_disk(self.images / self.records[index][0].file_name) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given images, in the given order."""
        return replace(self, records=tuple(self.records[i] for i in indices), unusable=())


def check_annotations(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], categories: CategoryTable, path: str
) -> tuple[dict[str, list[Mapping[str, Any]]], list[UnusableAnnotation]]:
    """Return the usable annotations by image, each with a unique id, and the unusable ones.

    A usable annotation has a known category and a valid crowd flag. Nothing in the file refers to annotation ids,
    so annotations with a missing, repeated or invalid id get a new one.

    Raises:
        DataError: no annotation has a segmentation.
    """
    entries = [entry for group in groups.values() for entry in group]
    if entries and not any(entry.get("segmentation") for entry in entries):  # exports of boxes write an empty list
        raise DataError(
            f"{path}: no annotation has a segmentation; boxes alone cannot be used, export polygons or masks"
        )
    next_id = 1 + max((i for i in map(_usable_id, entries) if i is not None), default=0)
    used_ids: set[int] = set()
    unusable: list[UnusableAnnotation] = []
    usable: dict[str, list[Mapping[str, Any]]] = {image: [] for image in groups}
    for image, group in groups.items():
        for entry in map(coco_json.with_listed_rings, group):
            try:
                where = f"annotation {str(entry.get('id'))[:40]}"
                coco_json.require_category(entry, categories, where)
                optional_flag(entry, "iscrowd", where)  # often invalid in a whole file, so report it early
            except DataError as error:
                unusable.append(UnusableAnnotation(path, str(error)))
                continue
            annotation_id = _usable_id(entry)
            if annotation_id is None or annotation_id in used_ids:
                usable[image].append({**entry, "id": next_id, coco_json.RENUMBERED_FIELD: True})
                next_id += 1
            else:
                used_ids.add(annotation_id)
                usable[image].append(entry)
    return usable, unusable


def _usable_id(entry: Mapping[str, Any]) -> int | None:
    """Return the id of an annotation; None if it is missing or not an integer of at most 62 bits."""
    try:
        annotation_id = coco_json.whole_number(entry, "id", "")
    except DataError:
        return None
    return annotation_id if abs(annotation_id) < 1 << 62 else None
