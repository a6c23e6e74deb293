"""Readers: raw data sets of every supported form, as Samples by index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, Self, assert_never

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.config import (
    Ade20kFullSource,
    Ade20kSource,
    CityscapesPanopticSource,
    CityscapesSource,
    CocoInstancesSource,
    CocoPanopticSource,
    CustomSource,
    DatasetConfig,
    HuggingFaceSource,
    LabelMapSource,
    MapillarySource,
    SourceConfig,
    SyntheticSource,
)
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.ade20k import open_ade20k
from m2f.data_pipeline.readers.ade20k_full import open_ade20k_full
from m2f.data_pipeline.readers.cityscapes import open_cityscapes, open_cityscapes_panoptic
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_panoptic import CocoPanopticReader
from m2f.data_pipeline.readers.files import require_file
from m2f.data_pipeline.readers.huggingface import open_huggingface
from m2f.data_pipeline.readers.label_maps import open_label_maps
from m2f.data_pipeline.readers.mapillary import open_mapillary
from m2f.data_pipeline.readers.synthetic import SyntheticReader
from m2f.data_pipeline.readers.unusable import UnusableAnnotation, require_none
from m2f.data_pipeline.sample import Sample


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
        case SyntheticSource() | CustomSource():
            digest.update(json.dumps(asdict(source), sort_keys=True).encode())
        case CocoPanopticSource():
            files = (source.panoptic_json, source.instances_json)
        case CocoInstancesSource():
            files = (source.instances_json,)
        case LabelMapSource() | HuggingFaceSource():
            digest.update(repr(source.void).encode())
            files = (source.categories,)
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
