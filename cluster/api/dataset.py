"""`m2f.Dataset`: write images and annotations from memory as shards for training and evaluation."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from m2f.cluster.api.images import Channels, ImageLike, given_images, loaded_images
from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.partition import Region, partition
from m2f.data_pipeline.readers.custom import CustomReader, check_annotation
from m2f.data_pipeline.readers.files import check_image
from m2f.data_pipeline.readers.masks import stack_layers
from m2f.data_pipeline.sample import VOID_ID, Annotation, Segment
from m2f.data_pipeline.sources import CustomSource
from m2f.data_pipeline.storage.storage import Storage, check_folder
from m2f.eval.arrays import (
    Instances,
    MapLike,
    PanopticImage,
    checked_instances,
    checked_panoptic,
    compressed_rle,
    to_array,
)
from m2f.eval.functions import class_list, thing_flags
from m2f.eval.metrics.mean_iou import BINARY_MASK, ignore_label, is_binary_mask
from m2f.eval.metrics.rle import decode_mask
from m2f.model.extras import report_missing_extras

Truth: TypeAlias = "PanopticImage | Instances | MapLike"
"""Annotation of one image. An array, tensor or list is a label map [H, W] of integer labels."""

_KINDS = (PanopticImage, Instances)
"""Types of annotations other than label maps."""
_MAX_ID = 2**24
"""Segment ids must be below this, as in COCO's maps."""
_NO_LABEL = _MAX_ID - 1
"""Internal value that replaces `ignore`, because `ignore` may be negative."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and their annotations in memory, which `write` stores as shards.

        m2f.Dataset(images, label_maps, ["road", "car"]).write("data/train")
        m2f.train(recipe, settings={"datasets": {"train": {"shards": "data/train"}}})

    All annotations must be of the same kind. `PanopticImage` supports panoptic, instance and semantic training.
    `Instances` supports instance training, and label maps support semantic training.
    """

    images: Sequence[ImageLike]
    """Images in any form that `Model.predict` accepts. They are stored losslessly as PNG."""
    annotations: Sequence[Truth]
    """One annotation per image, with the height H and width W of the image.

    Each is a `PanopticImage`, an `Instances` with masks as bool or uint8 [N, H, W] or run-length encodings, or a label
    map [H, W] of integers: an array, a tensor or a list. Masked pixels of a masked array have no label. Areas that are
    not stated are the numbers of pixels.
    """
    names: Sequence[str] | Mapping[int, str]
    """Names of the classes, by label: a list, or a mapping with the labels 0 to K - 1.

    In COCO files the id of a class is its label + 1.
    """
    is_thing: Sequence[bool] | Mapping[int, bool] | None = None
    """Whether each class is a thing (has instances), by label: a list or a mapping.

    None means that all classes are things for `Instances` and none for label maps. `PanopticImage` requires a value.
    """
    channels: Channels = "rgb"
    """Order of the colour channels in arrays and tensors: "rgb" or "bgr"."""
    ignore: int | None = None
    """Value of the pixels without a label in label maps. None: 255, or 65535 for 256 or more classes."""

    def write(self, folder: str | os.PathLike[str]) -> int:
        """Write shards and their manifest into a folder or `s3://` URL, and return the number of images.

        If the folder already contains this data set, the existing shards are kept. Needs the extra `train`.

        Raises:
            ConfigError: `channels` is neither "rgb" nor "bgr".
            DataError: an annotation does not fit its image or the classes (the message names the position of the
                image), `ignore` is not an integer, or the folder holds another data set.
            EvaluationError: an annotation cannot be converted to an array.
            StorageError: the folder cannot be written, its name is empty, or its URL has no bucket.
            MissingExtraError: the extra `train` is not installed.
        """
        check_folder(os.fspath(folder))
        if len(self.images) != len(self.annotations) or len(self.images) == 0:  # `not` fails for arrays
            raise DataError(
                f"{len(self.images)} images and {len(self.annotations)} annotations; give at least one "
                "image and one annotation per image"
            )
        with report_missing_extras("Dataset.write"):
            from m2f.data_pipeline.shards.write import write_dataset
        if self.ignore is not None and (isinstance(self.ignore, bool) or not isinstance(self.ignore, int | np.integer)):
            raise DataError(f"ignore is {self.ignore!r}; it must be an integer")
        table = self._table
        files = self._files()
        truths = [self._truth(position, truth) for position, truth in enumerate(self.annotations)]
        annotations = [self._annotation(position, truth) for position, truth in enumerate(truths)]
        if is_binary_mask(_label_values(truths), self.ignore, len(table.categories)):
            raise DataError(f"the label maps have {BINARY_MASK}")
        for position, (file, annotation) in enumerate(zip(files, annotations, strict=True)):
            height, width = check_annotation(annotation, table, f"annotation {position}")
            check_image(file, height, width, DatasetConfig.max_pixels, f"image {position}")
        position_of = {f"{position:08d}": position for position in range(len(files))}
        config = DatasetConfig(shards=os.fspath(folder), source=CustomSource(version=_digest(files, annotations)))
        reader = CustomReader.of(
            table,
            tuple(position_of),
            lambda name: (files[position_of[name]], annotations[position_of[name]]),
            config.max_pixels,
        )
        return write_dataset(reader, config, Storage()).num_samples

    def _files(self) -> list[bytes]:
        """Return every image as a PNG file."""
        storage = Storage()
        given = given_images(self.images, self.channels, storage)
        if len(given) != len(self.images):
            raise DataError(f"images match {len(given)} files for {len(self.annotations)} annotations; list each file")
        return [encode_png(loaded.pixels) for loaded in loaded_images(given, storage)]

    def _truth(self, position: int, truth: Truth) -> PanopticImage | Instances | np.ndarray:
        """Return an annotation, with the label map of any type as an array."""
        if isinstance(truth, PanopticImage | Instances):
            return truth
        if isinstance(truth, np.ma.MaskedArray) and np.issubdtype(truth.dtype, np.integer):
            return np.ma.filled(truth.astype(np.int64), self._ignored_label)
        return to_array(truth, f"annotation {position}")

    @property
    def _ignored_label(self) -> int:
        return ignore_label(len(self.names)) if self.ignore is None else self.ignore

    @cached_property
    def _table(self) -> CategoryTable:
        names, things = class_list(self.names, DataError), self.is_thing
        kinds = {next((kind for kind in _KINDS if isinstance(truth, kind)), np.ndarray) for truth in self.annotations}
        if len(kinds) != 1:
            listed = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise DataError(
                f"annotations are {listed}; use only one of PanopticImage, Instances or label maps (arrays)"
            )
        if things is None:
            if PanopticImage in kinds:
                raise DataError("is_thing is missing: PanopticImage annotations require it for every class")
            things = [Instances in kinds] * len(names)
        if not names:
            raise DataError("names is empty; give one name per class")
        pairs = enumerate(zip(names, thing_flags(things, len(names), DataError), strict=True))
        return CategoryTable(
            tuple(Category(label + 1, name, thing, distinct_color(label)) for label, (name, thing) in pairs)
        )

    def _annotation(self, position: int, truth: PanopticImage | Instances | np.ndarray) -> Annotation:
        if isinstance(truth, Instances):
            return self._instance_annotation(position, truth)
        where = f"annotation {position}"
        if isinstance(truth, PanopticImage):
            truth = checked_panoptic(truth, where, DataError)
        values = truth.id_map if isinstance(truth, PanopticImage) else truth
        if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer) or values.size == 0:
            raise DataError(
                f"{where} is a {values.dtype} map of shape {list(values.shape)}; it must be integers [H, W]"
            )
        if not isinstance(truth, PanopticImage):
            values = np.where(values == self._ignored_label, _NO_LABEL, values.astype(np.int64))
        if not 0 <= values.min() <= values.max() < _MAX_ID:
            raise DataError(
                f"{where} has values from {values.min()} to {values.max()}; they must be at least 0 and below {_MAX_ID}"
            )
        classify = self._segment_of(truth) if isinstance(truth, PanopticImage) else self._class_of
        requirement = (
            "have no valid label in `labels`"
            if isinstance(truth, PanopticImage)
            else f"are not below {len(self.names)}"
        )
        found = partition(
            values.astype(np.uint32), classify, where, f"{requirement}, and names has {len(self.names)} classes"
        )
        return _with_stated_areas(found, truth.areas, where) if isinstance(truth, PanopticImage) else found

    def _segment_of(self, truth: PanopticImage) -> Callable[[int], Region | None]:
        categories = self._table.categories

        def region(value: int) -> Region | None:
            if value == VOID_ID:
                return None
            label = truth.labels.get(value)
            if label is None or not 0 <= label < len(categories):
                raise KeyError(value)
            return Region(categories[label], value, value in truth.crowds)

        return region

    def _class_of(self, value: int) -> Region | None:
        if value == _NO_LABEL:
            return None
        if value >= len(self.names):
            raise KeyError(value)
        return Region(self._table.categories[value], value + 1)

    def _instance_annotation(self, position: int, given: Instances) -> Annotation:
        where = f"annotation {position}"
        truth = checked_instances(given, where, DataError)
        masks = [
            mask if isinstance(mask, np.ndarray) else decode_mask(compressed_rle(mask, f"{where}: mask {number}"))
            for number, mask in enumerate(truth.masks)
        ]
        labels = np.asarray(truth.labels).tolist()
        crowds = [False] * len(masks) if truth.is_crowd is None else np.asarray(truth.is_crowd).tolist()
        areas = [None] * len(masks) if truth.areas is None else [_area(area, where) for area in truth.areas]
        if invalid := [mask.dtype for mask in masks if mask.dtype not in (bool, np.uint8)]:
            raise DataError(f"{where} has a mask of {invalid[0]}; masks must be bool, or uint8 with 0 for background")
        if wrong := [label for label in labels if not 0 <= label < len(self.names)]:
            raise DataError(f"{where} has the label {wrong[0]}; names defines the labels 0 to {len(self.names) - 1}")
        height, width = self._size(position, masks)
        inst, layers, measured = stack_layers(masks, len(masks), height, width)
        categories = self._table.categories
        columns = enumerate(zip(labels, crowds, areas, layers, measured, strict=True), start=1)
        segments = tuple(
            Segment(
                id=number,
                category_id=categories[label].id,
                is_thing=categories[label].is_thing,
                is_crowd=crowd,
                area=float(pixels) if area is None else area,
                bbox=box,
                source_id=number,
                map="inst",
                layer=layer,
            )
            for number, (label, crowd, area, layer, (pixels, box)) in columns
        )
        return Annotation(seg=None, inst=inst, segments=segments)

    def _size(self, position: int, masks: Sequence[np.ndarray]) -> tuple[int, int]:
        shapes = {mask.shape for mask in masks}
        if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
            raise DataError(
                f"annotation {position} has masks of the shapes {sorted(shapes)}; all must have one shape [H, W]"
            )
        if shapes:
            height, width = shapes.pop()
            return height, width
        storage = Storage()
        given = given_images([self.images[position]], self.channels, storage)
        height, width, _ = next(loaded_images(given, storage)).pixels.shape
        return height, width


def _label_values(truths: Iterable[PanopticImage | Instances | np.ndarray]) -> set[int]:
    """Return the values in the label maps, up to the first map that shows that they are not binary masks."""
    values: set[int] = set()
    for truth in truths:
        if isinstance(truth, np.ndarray) and values <= {0, 255}:
            values.update(np.unique(truth).tolist())
    return values


def _with_stated_areas(annotation: Annotation, areas: Mapping[int, float], where: str) -> Annotation:
    """Return the annotation with the areas that are stated by segment id instead of the counted pixels."""
    segments = (
        replace(segment, area=_area(areas[segment.source_id], where)) if segment.source_id in areas else segment
        for segment in annotation.segments
    )
    return replace(annotation, segments=tuple(segments))


def _area(stated: float, where: str) -> float:
    area = float(stated)
    if not 0 <= area <= DatasetConfig.max_pixels:  # also true for NaN
        raise DataError(f"{where} has the area {area:g}; areas are numbers of pixels, at least 0")
    return area


def _digest(files: Sequence[bytes], annotations: Sequence[Annotation]) -> int:
    """Return a checksum of images and annotations. It is used as the version of the source."""
    value = 0
    for file, annotation in zip(files, annotations, strict=True):
        value = zlib.crc32(file, value)
        for layer in (annotation.seg, annotation.inst):
            value = value if layer is None else zlib.crc32(np.ascontiguousarray(layer).tobytes(), value)
        value = zlib.crc32(repr(annotation.segments).encode(), value)
    return value
