"""Reader for data sets that users load with their own Python code; docs/datasets.md has an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.readers.files import ANNOTATION_BYTES, check_image, make_key, unique_keys
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import VOID_ID, Annotation, Sample


@dataclass(frozen=True)
class CustomReader:
    """Reader built from a list of names and a function that loads the image and annotation for a name.

    Keys are made from the names, which must be unique even without their extensions.
    """

    categories: CategoryTable
    names: tuple[str, ...]
    load: Callable[[str], tuple[bytes, Annotation]]
    """Function that takes a name and returns the bytes of an image file and its ground truth. TIFF, BMP and WebP images
    are converted to PNG."""
    max_pixels: int
    indices: tuple[int, ...]
    """Position of each name in the whole data set, which is its image id."""

    @classmethod
    def of(
        cls,
        categories: CategoryTable,
        names: Sequence[str],
        load: Callable[[str], tuple[bytes, Annotation]],
        max_pixels: int,
    ) -> Self:
        """Build a reader. Raises DataError if two names would have the same key."""
        unique_keys(names)
        return cls(categories, tuple(names), load, max_pixels, tuple(range(len(names))))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys in the order of the names."""
        return tuple(make_key(name) for name in self.names)

    @property
    def unusable(self) -> tuple[UnusableAnnotation, ...]:
        """Return an empty tuple, because there is no annotation file."""
        return ()

    def source(self, index: int) -> str:
        """Return the name of the sample."""
        return self.names[index]

    def files(self, index: int) -> tuple[Path, ...]:
        """Return an empty tuple, because the files are unknown. Increase `version` of the source if they change."""
        return ()

    def read(self, index: int) -> Sample:
        """Load and check one sample. Raises DataError if its image, maps and segments do not match."""
        name = self.names[index]
        image, annotation = self.load(name)
        height, width = check_annotation(annotation, self.categories, name)
        file = check_image(image, height, width, self.max_pixels, name)
        return Sample(
            key=self.keys[index],
            image_id=self.indices[index],
            source=name,
            image=file.data,
            image_ext=file.ext,
            height=height,
            width=width,
            annotation=annotation,
            repairs=file.repairs,
        )

    def size_hint(self, index: int) -> int:
        """Return the size of the first image plus an estimate for maps, in bytes, without loading other images."""
        return self._first_image_bytes + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given samples, in the given order."""
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            indices=tuple(self.indices[i] for i in indices),
        )

    @cached_property
    def _first_image_bytes(self) -> int:
        return len(self.load(self.names[0])[0])


def check_annotation(annotation: Annotation, categories: CategoryTable, where: str) -> tuple[int, int]:
    """Check an annotation and return its height and width.

    Raises:
        DataError: there is no map; a map has another type or number of dimensions; the maps differ in size; a category
            is unknown; a segment and its category disagree about `is_thing`; a segment has an id below 1 or a layer
            that does not exist; segment ids repeat; an id in a map has no segment; pixels of an id are in another layer
            than its segment; or a segment of `seg` has no pixel.
    """
    seg, inst = annotation.seg, annotation.inst
    if seg is None and inst is None:
        raise DataError(f"{where}: the annotation has neither `seg` nor `inst`")
    for kind, ids, dimensions in (("seg", seg, 2), ("inst", inst, 3)):
        if ids is not None and (ids.ndim != dimensions or ids.dtype not in (np.uint8, np.uint16)):
            raise DataError(
                f"{where}: `{kind}` is {ids.dtype} with {ids.ndim} dimensions; make it uint8 or uint16 with "
                f"{dimensions}"
            )
    num_layers = {"seg": 0 if seg is None else 1, "inst": 0 if inst is None else len(inst)}
    if wrong := sorted(s.id for s in annotation.segments if s.id < 1 or s.layer not in range(num_layers[s.map])):
        raise DataError(f"{where}: segments have an id below 1 or a layer that does not exist: {format_list(wrong)}")
    shapes = {m.shape[-2:] for m in (seg, inst) if m is not None}
    if len(shapes) != 1:
        raise DataError(f"{where}: `seg` and `inst` differ in size: {format_list(sorted(shapes))}")
    unknown = sorted({s.category_id for s in annotation.segments} - set(categories.by_id))
    if unknown:
        raise DataError(f"{where}: segments have categories that the table does not define: {format_list(unknown)}")
    if wrong := sorted(s.id for s in annotation.segments if s.is_thing != categories.by_id[s.category_id].is_thing):
        raise DataError(f"{where}: segments have another `is_thing` than their category: {format_list(wrong)}")
    for kind, layers in (("seg", () if seg is None else seg[None]), ("inst", () if inst is None else inst)):
        listed = [segment.id for segment in annotation.segments if segment.map == kind]
        layer_of = {segment.id: segment.layer for segment in annotation.segments if segment.map == kind}
        if len(layer_of) != len(listed):
            raise DataError(f"{where}: segment ids of `{kind}` are not unique")
        found = [set(np.unique(layer).tolist()) - {VOID_ID} for layer in layers]
        present = set().union(*found)
        if unlisted := sorted(present - layer_of.keys()):
            raise DataError(f"{where}: `{kind}` has ids without a segment: {format_list(unlisted)}")
        if misplaced := sorted({i for layer, ids in enumerate(found) for i in ids if layer_of[i] != layer}):
            raise DataError(f"{where}: segments have pixels in another layer than theirs: {format_list(misplaced)}")
        if kind == "seg" and (empty := sorted(layer_of.keys() - present)):
            raise DataError(f"{where}: segments have no pixel in `seg`: {format_list(empty)}")
    return shapes.pop()
