"""Types for the format and the splits that were detected in a folder of own data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from m2f.data_pipeline.sources import SourceConfig

Split = Literal["train", "val", "test"]


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


def split_from_path(path: str) -> Split | None:
    """Return the split that a path names, as in `train`, `train2017` or `instances_val`; None if it names none.

    If the path names several splits, the last one counts.
    """
    words = re.findall(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])", path.lower())
    if not words:
        return None
    return "train" if words[-1].startswith("train") else "val" if words[-1].startswith("val") else "test"
