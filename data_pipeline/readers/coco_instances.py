"""COCO instance data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.config import CocoInstancesSource
from m2f.data_pipeline.errors import DataError
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
from m2f.data_pipeline.sample import Annotation, Sample


@dataclass(frozen=True)
class CocoInstancesReader:
    """Images with polygons or RLE masks that may overlap. Images without annotations are kept."""

    images: Path
    categories: CategoryTable
    records: tuple[tuple[CocoImage, Sequence[Mapping[str, Any]]], ...]
    """Every image with its annotations."""
    max_pixels: int

    @classmethod
    def open(cls, source: CocoInstancesSource, max_pixels: int) -> Self:
        """Read and check the annotation file. Raises DataError."""
        folder = require_folder(source.images)
        path = source.instances_json
        document = coco_json.read_document(path, ("images", "annotations", "categories"))
        images = coco_json.read_images(document, path)
        unique_keys(image.file_name for image in images)
        categories = coco_json.read_categories(document, path, things_only=True)
        groups = coco_json.group_by_image(document, images, path, strict=True)
        check_annotations(groups, categories, path)
        return cls(folder, categories, tuple((image, groups[image.source_id]) for image in images), max_pixels)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys in the order of the annotation file."""
        return tuple(make_key(image.file_name) for image, _ in self.records)

    def source(self, index: int) -> str:
        """Folder and name of the image."""
        return f"{self.images.name}/{self.records[index][0].file_name}"

    def read(self, index: int) -> Sample:
        """One image with its instances in layers."""
        image, annotations = self.records[index]
        file = load_image(self.images / image.file_name, image.height, image.width, self.max_pixels)
        inst, segments = instance_layers(annotations, image.height, image.width, self.categories, self.source(index))
        return Sample(
            key=self.keys[index],
            image_id=image.id,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=image.height,
            width=image.width,
            annotation=Annotation(seg=None, inst=inst, segments=segments),
        )

    def size_hint(self, index: int) -> int:
        """Size of the image file plus an allowance for masks."""
        return size_on_disk(self.images / self.records[index][0].file_name) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """A reader of only these images."""
        return replace(self, records=tuple(self.records[i] for i in indices))


def check_annotations(groups: Mapping[str, Sequence[Mapping[str, Any]]], categories: CategoryTable, path: str) -> None:
    """Raise DataError where annotations lack fields, repeat ids or use unknown categories."""
    entries = [entry for group in groups.values() for entry in group]
    for entry in entries:
        where = f"{path}: annotation {entry.get('id')}"
        for name in ("id", "category_id"):
            coco_json.whole_number(entry, name, where)
        if "segmentation" not in entry:
            raise DataError(f"{where} has no segmentation; boxes alone cannot be used")
    coco_json.require_unique((int(entry["id"]) for entry in entries), f"{path}: annotation ids")
    coco_json.require_known_categories(Counter(int(entry["category_id"]) for entry in entries), categories, path)
