"""Readers of raw data sets in all supported formats. A reader returns Samples by index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, Self, assert_never

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.adapted.background import BackgroundReader
from m2f.data_pipeline.readers.adapted.part import part_indices
from m2f.data_pipeline.readers.adapted.tiles import TileReader
from m2f.data_pipeline.readers.ade20k import open_ade20k
from m2f.data_pipeline.readers.ade20k_full import open_ade20k_full
from m2f.data_pipeline.readers.cityscapes import open_cityscapes, open_cityscapes_panoptic
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_panoptic import CocoPanopticReader
from m2f.data_pipeline.readers.exports.coco_stuff import open_coco_stuff
from m2f.data_pipeline.readers.exports.color_maps import open_color_maps
from m2f.data_pipeline.readers.exports.cvat import open_cvat
from m2f.data_pipeline.readers.exports.labelme import open_labelme
from m2f.data_pipeline.readers.exports.voc import open_voc
from m2f.data_pipeline.readers.exports.yolo_seg import open_yolo_seg
from m2f.data_pipeline.readers.files import files_below, require_file, require_folder
from m2f.data_pipeline.readers.huggingface import open_huggingface
from m2f.data_pipeline.readers.label_maps import open_label_maps
from m2f.data_pipeline.readers.mapillary import open_mapillary
from m2f.data_pipeline.readers.synthetic import SyntheticReader
from m2f.data_pipeline.readers.unusable import UnusableAnnotation, require_all_usable
from m2f.data_pipeline.sample import Sample
from m2f.data_pipeline.sources import (
    Ade20kFullSource,
    Ade20kSource,
    CityscapesPanopticSource,
    CityscapesSource,
    CocoInstancesSource,
    CocoPanopticSource,
    CocoStuffSource,
    ColorMapSource,
    CustomSource,
    CvatSource,
    HuggingFaceSource,
    LabelMapSource,
    LabelmeSource,
    MapillarySource,
    SourceConfig,
    SyntheticSource,
    VocSource,
    YoloSegSource,
)


class Reader(Protocol):
    """A raw data set with random access. It is picklable: a Ray task receives the `subset` that it writes."""

    @property
    def categories(self) -> CategoryTable:
        """Return the categories in the order of the source."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Return the unique keys of all samples in the order of the source."""
        ...

    @property
    def unusable(self) -> Sequence[UnusableAnnotation]:
        """Return the annotations that are left out because of errors in the annotation file itself."""
        ...

    def source(self, index: int) -> str:
        """Return the origin of a sample; see Sample.source."""
        ...

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the image file and then the map files of a sample, in a fixed order; empty if it has no files."""
        ...

    def read(self, index: int) -> Sample:
        """Read and check one sample. Raises DataError with the file and the problem."""
        ...

    def size_hint(self, index: int) -> int:
        """Return the approximate size of the sample in a shard in bytes, without reading the sample."""
        ...

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given samples, in the given order."""
        ...


def open_reader(source: SourceConfig, max_pixels: int = DatasetConfig.max_pixels, *, skip_bad: bool = False) -> Reader:
    """Return the reader of a raw data set.

    Args:
        source: settings of the source.
        max_pixels: limit of height x width of an image.
        skip_bad: leave out annotations with errors in the annotation file, instead of raising an error.

    Raises:
        DataError: files are missing, unreadable or contradict each other, or annotations are unusable.
    """
    reader = _open(source, max_pixels)
    if not skip_bad:
        require_all_usable(reader.unusable)
    return reader


def open_dataset(dataset: DatasetConfig) -> tuple[Reader, tuple[UnusableAnnotation, ...]]:
    """Return the reader of a data set and the unusable annotations of its source.

    The reader applies the settings `background`, `part` and `tiles`.

    Raises:
        DataError: the data set has no source; its files are missing, unreadable or contradict each other; or
            `background`, `part` or `tiles` cannot be applied.
    """
    if dataset.source is None:
        raise DataError("no source is configured; set datasets.<name>.source")
    reader = open_reader(dataset.source, dataset.max_pixels, skip_bad=True)
    unusable = tuple(reader.unusable)
    if dataset.background is not None:
        reader = BackgroundReader.open(reader, dataset.background)
    if dataset.part is not None:
        reader = reader.subset(part_indices(reader.keys, dataset.part))
    return (reader if dataset.tiles is None else TileReader.open(reader, dataset.tiles)), unusable


def dataset_fingerprint(dataset: DatasetConfig, *, earlier: bool = False) -> str:
    """Return the fingerprint of the source together with the settings `part`, `background` and `tiles`.

    With `earlier`, return the fingerprint that earlier versions computed; see `source_fingerprint`.
    """
    assert dataset.source is not None
    fingerprint = source_fingerprint(dataset.source, earlier=earlier)
    settings = {name: getattr(dataset, name) for name in ("part", "background", "tiles")}
    if all(value is None for value in settings.values()):
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {settings}".encode()).hexdigest()


def _open(source: SourceConfig, max_pixels: int) -> Reader:
    match source:
        case SyntheticSource():
            return SyntheticReader.open(source)
        case CocoPanopticSource():
            return CocoPanopticReader.open(source, max_pixels)
        case CocoInstancesSource():
            return CocoInstancesReader.open(source, max_pixels)
        case LabelMapSource():
            return open_label_maps(source, max_pixels)
        case HuggingFaceSource():
            return open_huggingface(source, max_pixels)
        case Ade20kSource():
            return open_ade20k(source, max_pixels)
        case Ade20kFullSource():
            return open_ade20k_full(source, max_pixels)
        case CityscapesSource():
            return open_cityscapes(source, max_pixels)
        case CityscapesPanopticSource():
            return open_cityscapes_panoptic(source, max_pixels)
        case MapillarySource():
            return open_mapillary(source, max_pixels)
        case YoloSegSource():
            return open_yolo_seg(source, max_pixels)
        case LabelmeSource():
            return open_labelme(source, max_pixels)
        case CvatSource():
            return open_cvat(source, max_pixels)
        case VocSource():
            return open_voc(source, max_pixels)
        case ColorMapSource():
            return open_color_maps(source, max_pixels)
        case CocoStuffSource():
            return open_coco_stuff(source, max_pixels)
        case CustomSource():
            raise DataError(
                "datasets.<name>.source.kind is custom: its shards come from your own Python code, which calls "
                "m2f.data_pipeline.shards.write.write_dataset (docs/datasets.md has an example)"
            )
        case _:
            assert_never(source)


def source_fingerprint(source: SourceConfig, *, earlier: bool = False) -> str:
    """Return a hex digest of the settings and the annotation files of a source. It is part of a shard plan's identity.

    Folder names are not included, so that a data set can be moved. Images and maps are not included either; each shard
    keeps a record of its own source files.

    With `earlier`, return the digest that earlier versions computed, which did not include the names of YOLO's text
    files. For other sources, both digests are equal.
    """
    digest = hashlib.sha256(source.kind.encode())
    files: tuple[str | None, ...] = ()
    match source:
        case SyntheticSource():
            # Earlier versions had these values as constants. At their defaults they are left out of the digest, which
            # keeps old digests valid, so the defaults must not change.
            added_fields = {"small_share", "small_diameters"}
            settings = {
                name: value
                for name, value in asdict(source).items()
                if name not in added_fields or value != getattr(SyntheticSource, name)
            }
            digest.update(json.dumps(settings, sort_keys=True).encode())
        case CustomSource():
            digest.update(json.dumps(asdict(source), sort_keys=True).encode())
        case CocoPanopticSource():
            files = (source.panoptic_json, source.instances_json)
        case CocoInstancesSource():
            if source.crowds_are_objects:  # left out if off, to keep digests of earlier versions
                digest.update(b"crowds are objects")
            files = (source.instances_json,)
        case LabelMapSource() | HuggingFaceSource():
            digest.update(repr(source.void).encode())
            if isinstance(source, LabelMapSource):  # empty suffixes add nothing, which keeps old digests
                digest.update(source.suffix.encode() + _image_suffix_bytes(source))
            files = (source.categories,)
        case YoloSegSource():
            texts = _files_below(source.labels, ".txt")
            if not earlier:  # the name of a text file is the only link to its image
                names = [Path(text).relative_to(source.labels).as_posix() for text in texts]
                digest.update(json.dumps(names).encode())
            files = (source.data_yaml, *texts, source.image_set)
        case LabelmeSource():
            digest.update(repr(source.classes).encode())
            files = _files_below(source.annotations, ".json")
        case CvatSource():
            if source.subset is not None:  # left out if None, to keep digests of earlier versions
                digest.update(f"subset {source.subset}".encode())
            files = (source.annotations,)
        case VocSource():
            files = (source.image_set, source.legend)
        case ColorMapSource():
            digest.update(repr((source.void, source.suffix)).encode() + _image_suffix_bytes(source))
            files = (source.legend,)
        case CocoStuffSource():
            files = (source.label_names,)
        case Ade20kSource():
            digest.update(b"semantic" if source.instances is None else b"panoptic")
        case Ade20kFullSource():
            files = (source.categories,)
        case CityscapesSource():
            pass  # everything is in the maps
        case CityscapesPanopticSource():
            files = (source.panoptic_json,)
        case MapillarySource():
            files = (source.config_json,)
        case _:
            assert_never(source)
    for file in files:
        if file is not None:
            require_file(file)
            with Path(file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _files_below(folder: str, ending: str) -> tuple[str, ...]:
    return tuple(str(path) for path in files_below(require_folder(folder), ending))


def _image_suffix_bytes(source: LabelMapSource | ColorMapSource) -> bytes:
    """Return the text that an image suffix adds to a digest; empty without a suffix, to keep old digests."""
    return f" of images {source.image_suffix}".encode() if source.image_suffix else b""
