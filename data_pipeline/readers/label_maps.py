"""Folders of images and class maps with the same stems (CamVid, Pascal VOC, own data)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.categories import Category, CategoryTable
from data_pipeline.codec import id_dtype
from data_pipeline.config import LabelMapSource
from data_pipeline.errors import DataError
from data_pipeline.image_file import BrokenImageError, decode_index_png
from data_pipeline.readers.coco_json import field, read_color, whole_number
from data_pipeline.readers.files import (
    ANNOTATION_BYTES,
    load_image,
    make_key,
    read_bytes,
    read_json,
    require_folder,
    size_on_disk,
    some,
    unique_keys,
)
from data_pipeline.readers.masks import pixel_box
from data_pipeline.sample import Annotation, Sample, Segment

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True, slots=True)
class LabelMapRecord:
    """Relative names of an image and its label map."""

    index: int
    """Position in the whole data set; the image id."""
    image: str
    label: str


@dataclass(frozen=True)
class LabelMapReader:
    """Every class that is present in an image becomes one segment, stuff and things alike."""

    images: Path
    labels: Path
    categories: CategoryTable
    void: frozenset[int]
    records: tuple[LabelMapRecord, ...]
    max_pixels: int

    @classmethod
    def open(cls, source: LabelMapSource, max_pixels: int) -> Self:
        """Pair images with label maps. Raises DataError for files without a partner."""
        images, labels = require_folder(source.images), require_folder(source.labels)
        categories, void = _read_categories(source)
        records = _pair(images, labels)
        return cls(images, labels, categories, void, records, max_pixels)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys in the order of the file names."""
        return tuple(make_key(record.image) for record in self.records)

    def source(self, index: int) -> str:
        """Folder and name of the image."""
        return f"{self.images.name}/{self.records[index].image}"

    def read(self, index: int) -> Sample:
        """One image with a segment per class present."""
        record = self.records[index]
        label_path = self.labels / record.label
        try:
            values = decode_index_png(read_bytes(label_path))
        except BrokenImageError as error:
            raise DataError(f"{label_path}: {error}") from error
        height, width = values.shape
        file = load_image(self.images / record.image, height, width, self.max_pixels)
        seg, segments = self._segments(values, label_path)
        return Sample(
            key=self.keys[index],
            image_id=record.index,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=height,
            width=width,
            annotation=Annotation(seg=seg, inst=None, segments=segments),
        )

    def size_hint(self, index: int) -> int:
        """Size of the image file plus an allowance for the map."""
        return size_on_disk(self.images / self.records[index].image) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """A reader of only these images."""
        return replace(self, records=tuple(self.records[i] for i in indices))

    def _segments(self, values: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[Segment, ...]]:
        areas = np.bincount(values.ravel())
        present = np.flatnonzero(areas).tolist()
        unknown = [v for v in present if v not in self.categories.by_id and v not in self.void]
        if unknown:
            raise DataError(
                f"{path}: pixel values {some(unknown, 20)} are neither categories nor void; "
                "add them to the categories file or to source.void"
            )
        classes = [v for v in present if v not in self.void]
        table = np.zeros(len(areas), id_dtype(len(classes)))
        table[classes] = np.arange(1, len(classes) + 1)
        seg = table[values]
        segments = tuple(
            Segment(
                id=local_id,
                category_id=value,
                is_thing=self.categories.by_id[value].is_thing,
                is_crowd=False,
                area=float(areas[value]),
                bbox=pixel_box(seg == local_id),
                source_id=value,
                map="seg",
            )
            for local_id, value in enumerate(classes, start=1)
        )
        return seg, segments


def _read_categories(source: LabelMapSource) -> tuple[CategoryTable, frozenset[int]]:
    """Categories and void values; entries marked `"ignore": true` are void too."""
    entries = read_json(source.categories)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{source.categories} is not a list of {{label, name, color, isthing}}")
    categories, void = [], set(source.void)
    for number, entry in enumerate(entries):
        where = f"{source.categories}: entry {number}"
        value = whole_number(entry, "label", where)
        if entry.get("ignore"):
            void.add(value)
        elif value not in void:
            name, is_thing = str(field(entry, "name", where)), bool(field(entry, "isthing", where))
            categories.append(Category(value, name, is_thing, read_color(entry, number)))
    if not categories:
        raise DataError(f"{source.categories} defines no category beside void")
    return CategoryTable(tuple(categories)), frozenset(void)


def _pair(images: Path, labels: Path) -> tuple[LabelMapRecord, ...]:
    image_names, label_names = _names_by_stem(images, _IMAGE_SUFFIXES), _names_by_stem(labels, frozenset({".png"}))
    if not image_names:
        raise DataError(f"{images} holds no JPEG or PNG image; the data set is empty")
    alone = sorted(image_names.keys() ^ label_names.keys())
    if alone:
        raise DataError(
            f"{len(alone)} files have no partner of the same stem between {images} and {labels} (PNG): {some(alone)}"
        )
    stems = sorted(image_names)
    return tuple(LabelMapRecord(i, image_names[stem], label_names[stem]) for i, stem in enumerate(stems))


def _names_by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    """Relative names of all files with these suffixes, by relative name without suffix."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    unique_keys(names)
    return {str(Path(name).with_suffix("")): name for name in names}
