"""Types for the format and the splits that were detected in a folder of own data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from m2f.data_pipeline.sources import CvatSource, SourceConfig

Split = Literal["train", "val", "test"]
_ANNOTATION_FIELDS = ("image_set", "instances_json", "panoptic_json", "annotations", "labels", "class_maps")


@dataclass(frozen=True)
class SourceSet:
    """One source of a data format, with its split."""

    split: Split | None
    """Split of the source; None if the names do not show it."""
    source: SourceConfig


@dataclass(frozen=True)
class DataFormat:
    """A format of images and annotations that fits a folder."""

    kind: str
    evidence: str
    """Text for the user that says why the format fits."""
    sets: tuple[SourceSet, ...]
    classes: Mapping[int, str | None] = field(default_factory=dict)
    """Names by value of label maps (None if unknown); empty if the format or a category file defines the classes."""
    notes: tuple[str, ...] = ()
    """Messages for the user about files that are not used, and about choices to check."""


@dataclass(frozen=True)
class ChosenSets:
    """The sets of a data format by use."""

    train: tuple[SourceSet, ...]
    val: tuple[SourceSet, ...]
    """Sets for validation; empty if the validation images are drawn from `train`."""
    unused: tuple[SourceSet, ...]


def choose_sets(data_format: DataFormat) -> ChosenSets:
    """Return which sets are for training and for validation.

    Sets without a split are training sets, unless a set is named `train`: they often list all images again, including
    those for validation. If there is no training set, the validation sets are split, or else the test sets.
    """
    by_split = {
        split: tuple(s for s in data_format.sets if s.split == split) for split in ("train", "val", "test", None)
    }
    train, val = by_split["train"] or by_split[None], by_split["val"]
    if not train:
        train, val = val or by_split["test"], ()
    return ChosenSets(train, val, tuple(s for s in data_format.sets if s not in (*train, *val)))


def annotation_path(source: SourceConfig) -> str:
    """Return the path of a source's file or folder of annotations; its kind if it has neither.

    The result is for messages: if the source uses a subset of the file, it ends with the name of the subset.
    """
    paths = (getattr(source, name, None) for name in _ANNOTATION_FIELDS)
    path = next((path for path in paths if path), source.kind)
    subset = source.subset if isinstance(source, CvatSource) else None
    return path if subset is None else f"{path} (subset {subset!r})"


def split_from_path(path: str) -> Split | None:
    """Return the split that a path names, as in `train`, `train2017` or `instances_val`; None if it names none.

    If the path names several splits, the last one counts.
    """
    words = re.findall(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])", path.lower())
    if not words:
        return None
    return "train" if words[-1].startswith("train") else "val" if words[-1].startswith("val") else "test"
