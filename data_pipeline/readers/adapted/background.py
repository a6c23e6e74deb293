"""Add a background class and a panoptic map to instance data, which allows panoptic and semantic training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.masks import pixel_box
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation, Sample, Segment, id_dtype

if TYPE_CHECKING:
    from m2f.data_pipeline.readers import Reader


@dataclass(frozen=True)
class BackgroundReader:
    """Wraps a reader of instances and adds a panoptic map with a background class to its samples.

    Later objects cover earlier ones in the map.
    """

    reader: Any
    """Wrapped Reader, whose samples have only instance layers."""
    categories: CategoryTable

    @classmethod
    def open(cls, reader: Reader, name: str) -> Self:
        """Wrap a reader and add a stuff class with this name. Raises DataError if a class has this name already."""
        existing = reader.categories.categories
        if name in {category.name for category in existing}:
            raise DataError(f"datasets.<name>.background is {name}, which is already a class; choose another name")
        background = Category(1 + max(category.id for category in existing), name, False, (0, 0, 0))
        return cls(reader, CategoryTable((*existing, background)))

    @property
    def keys(self) -> Sequence[str]:
        """Return the value of the wrapped reader."""
        return self.reader.keys

    @property
    def unusable(self) -> Sequence[UnusableAnnotation]:
        """Return the value of the wrapped reader."""
        return self.reader.unusable

    def source(self, index: int) -> str:
        """Return the value of the wrapped reader."""
        return self.reader.source(index)

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the value of the wrapped reader."""
        return self.reader.files(index)

    def size_hint(self, index: int) -> int:
        """Return the value of the wrapped reader."""
        return self.reader.size_hint(index)

    def read(self, index: int) -> Sample:
        """Read one image and add the map. Raises DataError if the source already has a map."""
        sample = self.reader.read(index)
        return replace(sample, annotation=with_background(sample.annotation, self.categories.categories[-1]))

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given images, in the given order."""
        return replace(self, reader=self.reader.subset(indices))


def with_background(annotation: Annotation, background: Category) -> Annotation:
    """Return an annotation with the same layers and a panoptic map.

    Objects are painted in their order, so later ones cover earlier ones. All other pixels get the class `background`.

    Raises:
        DataError: the annotation already has a map, or has no instance layers.
    """
    if annotation.seg is not None or annotation.inst is None:
        raise DataError("datasets.<name>.background needs a source of instances; this one already labels every pixel")
    instances = [segment for segment in annotation.segments if segment.map == "inst"]
    seg = np.zeros(annotation.inst.shape[1:], id_dtype(len(instances) + 1))
    for number, segment in enumerate(instances, start=1):
        seg[annotation.inst[segment.layer] == segment.id] = number
    seg[seg == 0] = len(instances) + 1
    pixels = np.bincount(seg.ravel(), minlength=len(instances) + 2)
    map_segments = []
    for number, segment in enumerate(instances, start=1):
        if pixels[number]:
            box = _box(seg == number)
            map_segments.append(
                replace(segment, id=number, map="seg", layer=0, area=float(pixels[number]), bbox=box, polygons=None)
            )
    if pixels[-1]:
        map_segments.append(
            Segment(
                id=len(instances) + 1,
                category_id=background.id,
                is_thing=False,
                is_crowd=False,
                area=float(pixels[-1]),
                bbox=_box(seg == len(instances) + 1),
                source_id=1 + max((segment.source_id for segment in instances), default=0),
                map="seg",
            )
        )
    return Annotation(seg=seg, inst=annotation.inst, segments=(*map_segments, *annotation.segments))


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    x, y, width, height = pixel_box(mask)
    return float(x), float(y), float(width), float(height)
