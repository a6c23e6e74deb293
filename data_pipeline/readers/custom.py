"""Data sets that users read with their own Python code; docs/datasets.md has an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError, some
from m2f.data_pipeline.readers.files import ANNOTATION_BYTES, check_image, make_key, unique_keys
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import VOID_ID, Annotation, Sample


@dataclass(frozen=True)
class CustomReader:
    """A reader made of names and a function that loads what belongs to a name.

    Names become keys: they must be unique, and stay unique without their extensions.
    """

    categories: CategoryTable
    names: tuple[str, ...]
    load: Callable[[str], tuple[bytes, Annotation]]
    """Name -> content of a JPEG or PNG file and its ground truth."""
    max_pixels: int
    indices: tuple[int, ...]
    """Position of every name in the whole data set; the image ids."""

    @classmethod
    def of(
        cls,
        categories: CategoryTable,
        names: Sequence[str],
        load: Callable[[str], tuple[bytes, Annotation]],
        max_pixels: int,
    ) -> Self:
        """Raises DataError where names would share a key."""
        unique_keys(names)
        return cls(categories, tuple(names), load, max_pixels, tuple(range(len(names))))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys in the order of the names."""
        return tuple(make_key(name) for name in self.names)

    @property
    def unusable(self) -> tuple[UnusableAnnotation, ...]:
        """None: there is no file that lists annotations."""
        return ()

    def source(self, index: int) -> str:
        """The name."""
        return self.names[index]

    def files(self, index: int) -> tuple[Path, ...]:
        """None that are known: count `version` of the source up where they change."""
        return ()

    def read(self, index: int) -> Sample:
        """One sample. Raises DataError where image, maps and segments do not fit each other."""
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
        )

    def size_hint(self, index: int) -> int:
        """Size of the first image plus an allowance for maps: others are not known before they are loaded."""
        return self._first_image_bytes + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """A reader of only these samples."""
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            indices=tuple(self.indices[i] for i in indices),
        )

    @cached_property
    def _first_image_bytes(self) -> int:
        return len(self.load(self.names[0])[0])


def check_annotation(annotation: Annotation, categories: CategoryTable, where: str) -> tuple[int, int]:
    """Height and width of an annotation. Raises DataError where maps and segments do not fit each other.

    Every id in a map must be a segment's, every segment of `seg` must have a pixel, and categories must be known.
    """
    seg, inst = annotation.seg, annotation.inst
    if seg is None and inst is None:
        raise DataError(f"{where}: the annotation has neither `seg` nor `inst`")
    shapes = {m.shape[-2:] for m in (seg, inst) if m is not None}
    if len(shapes) != 1:
        raise DataError(f"{where}: `seg` and `inst` differ in size: {some(sorted(shapes))}")
    unknown = sorted({s.category_id for s in annotation.segments} - set(categories.by_id))
    if unknown:
        raise DataError(f"{where}: segments have categories that the table does not define: {some(unknown)}")
    for kind, ids in (("seg", seg), ("inst", inst)):
        named = [segment.id for segment in annotation.segments if segment.map == kind]
        if len(set(named)) != len(named):
            raise DataError(f"{where}: segment ids of `{kind}` repeat")
        present = set() if ids is None else set(np.unique(ids).tolist()) - {VOID_ID}
        if nameless := sorted(present - set(named)):
            raise DataError(f"{where}: `{kind}` has ids without a segment: {some(nameless)}")
        if kind == "seg" and (absent := sorted(set(named) - present)):
            raise DataError(f"{where}: segments have no pixel in `seg`: {some(absent)}")
    return shapes.pop()
