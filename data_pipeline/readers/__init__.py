"""Readers: raw data sets of every supported form, as Samples by index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, Self, assert_never

from data_pipeline.categories import CategoryTable
from data_pipeline.config import (
    CocoInstancesSource,
    CocoPanopticSource,
    DatasetConfig,
    LabelMapSource,
    SourceConfig,
    SyntheticSource,
)
from data_pipeline.readers.files import require_file
from data_pipeline.sample import Sample


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

    def source(self, index: int) -> str:
        """Where a sample comes from, as in Sample.source."""
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


def open_reader(source: SourceConfig, max_pixels: int = DatasetConfig.max_pixels) -> Reader:
    """Reader of a raw data set. Raises DataError where files are missing, unreadable or contradict each other."""
    match source:
        case SyntheticSource():
            from data_pipeline.readers.synthetic import SyntheticReader

            return SyntheticReader.open(source)
        case CocoPanopticSource():
            from data_pipeline.readers.coco_panoptic import CocoPanopticReader

            return CocoPanopticReader.open(source, max_pixels)
        case CocoInstancesSource():
            from data_pipeline.readers.coco_instances import CocoInstancesReader

            return CocoInstancesReader.open(source, max_pixels)
        case LabelMapSource():
            from data_pipeline.readers.label_maps import LabelMapReader

            return LabelMapReader.open(source, max_pixels)
        case _:
            assert_never(source)


def source_fingerprint(source: SourceConfig) -> str:
    """Hex digest of the source's settings and of the content of its annotation files; part of a shard plan's identity.

    Names of folders do not count, so that a data set may move. Images are not read: they are checked one by one when
    they are written.
    """
    digest = hashlib.sha256(source.kind.encode())
    match source:
        case SyntheticSource():
            digest.update(json.dumps(asdict(source), sort_keys=True).encode())
            files: tuple[str | None, ...] = ()
        case CocoPanopticSource():
            files = (source.panoptic_json, source.instances_json)
        case CocoInstancesSource():
            files = (source.instances_json,)
        case LabelMapSource():
            digest.update(repr(source.void).encode())
            files = (source.categories,)
        case _:
            assert_never(source)
    for file in files:
        if file is not None:
            require_file(file)
            with Path(file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
