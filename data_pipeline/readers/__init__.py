"""Readers: raw data sets of every supported form, as Samples by index."""

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
from m2f.data_pipeline.readers.files import require_file, require_folder
from m2f.data_pipeline.readers.huggingface import open_huggingface
from m2f.data_pipeline.readers.label_maps import open_label_maps
from m2f.data_pipeline.readers.mapillary import open_mapillary
from m2f.data_pipeline.readers.synthetic import SyntheticReader
from m2f.data_pipeline.readers.unusable import UnusableAnnotation, require_none
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
    """A raw data set with random access. Picklable; `subset` makes what one task needs small to send."""

    @property
    def categories(self) -> CategoryTable:
        """Categories in the order of the source."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all samples in the source's order; unique."""
        ...

    @property
    def unusable(self) -> Sequence[UnusableAnnotation]:
        """Annotations that are left out because their file alone shows that they cannot be used."""
        ...

    def source(self, index: int) -> str:
        """Where a sample comes from, as in Sample.source."""
        ...

    def files(self, index: int) -> tuple[Path, ...]:
        """The image and map files that a sample is made of, always in the same order; none where there are no files."""
        ...

    def read(self, index: int) -> Sample:
        """One sample, fully checked. Raises DataError naming the file and the problem."""
        ...

    def size_hint(self, index: int) -> int:
        """Bytes that the sample will roughly take in a shard, found without reading it."""
        ...

    def subset(self, indices: Sequence[int]) -> Self:
        """A reader of only these samples, in this order."""
        ...


def open_reader(source: SourceConfig, max_pixels: int = DatasetConfig.max_pixels, *, skip_bad: bool = False) -> Reader:
    """Reader of a raw data set. Raises DataError where files are missing, unreadable or contradict each other.

    Unless `skip_bad`, annotations that their file alone shows to be unusable are refused, too.
    """
    reader = _open(source, max_pixels)
    if not skip_bad:
        require_none(reader.unusable)
    return reader


def open_dataset(dataset: DatasetConfig) -> tuple[Reader, tuple[UnusableAnnotation, ...]]:
    """Reader of a data set's source, or a part of it, with what its settings add; and all its unusable annotations.

    Raises DataError as `open_reader` does, and where there is no source.
    """
    if dataset.source is None:
        raise DataError("there is no source to read; set datasets.<name>.source")
    reader = open_reader(dataset.source, dataset.max_pixels, skip_bad=True)
    unusable = tuple(reader.unusable)
    if dataset.background is not None:
        reader = BackgroundReader.open(reader, dataset.background)
    if dataset.part is not None:
        reader = reader.subset(part_indices(reader.keys, dataset.part))
    return (reader if dataset.tiles is None else TileReader.open(reader, dataset.tiles)), unusable


def dataset_fingerprint(dataset: DatasetConfig) -> str:
    """As `source_fingerprint`, with the settings that change what is made of the source."""
    assert dataset.source is not None
    own = source_fingerprint(dataset.source)
    settings = {name: getattr(dataset, name) for name in ("part", "background", "tiles")}
    if all(value is None for value in settings.values()):
        return own
    return hashlib.sha256(f"{own} {settings}".encode()).hexdigest()


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


def source_fingerprint(source: SourceConfig) -> str:
    """Hex digest of the source's settings and of the content of its annotation files; part of a shard plan's identity.

    Names of folders do not count, so that a data set may move. Images are not read: they are checked one by one when
    they are written.
    """
    digest = hashlib.sha256(source.kind.encode())
    files: tuple[str | None, ...] = ()
    match source:
        case SyntheticSource():
            # Earlier versions had these defaults as constants: at them the settings stay out of the digest, so the
            # defaults must not change.
            new = {"small_share", "small_diameters"}
            settings = {
                name: value
                for name, value in asdict(source).items()
                if name not in new or value != getattr(SyntheticSource, name)
            }
            digest.update(json.dumps(settings, sort_keys=True).encode())
        case CustomSource():
            digest.update(json.dumps(asdict(source), sort_keys=True).encode())
        case CocoPanopticSource():
            files = (source.panoptic_json, source.instances_json)
        case CocoInstancesSource():
            if source.crowds_are_objects:  # sets of earlier versions have it off
                digest.update(b"crowds are objects")
            files = (source.instances_json,)
        case LabelMapSource() | HuggingFaceSource():
            digest.update(repr(source.void).encode())
            if isinstance(source, LabelMapSource) and source.suffix:  # sets of earlier versions have none
                digest.update(source.suffix.encode())
            files = (source.categories,)
        case YoloSegSource():
            files = (source.data_yaml, *_files_below(source.labels, ".txt"))
        case LabelmeSource():
            digest.update(repr(source.classes).encode())
            files = _files_below(source.annotations, ".json")
        case CvatSource():
            files = (source.annotations,)
        case VocSource():
            files = (source.image_set, source.legend)
        case ColorMapSource():
            digest.update(repr((source.void, source.suffix)).encode())
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
    return tuple(str(path) for path in sorted(require_folder(folder).rglob(f"*{ending}")))
