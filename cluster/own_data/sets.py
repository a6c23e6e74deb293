"""What was found in a folder of own data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from m2f.data_pipeline.sources import SourceConfig

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SourceSet:
    """One source of a form."""

    split: Split | None
    """None where the names do not say."""
    source: SourceConfig


@dataclass(frozen=True)
class Form:
    """A form that fits a folder."""

    kind: str
    evidence: str
    """What shows it, for the user."""
    sets: tuple[SourceSet, ...]
    classes: Mapping[int, str | None] = field(default_factory=dict)
    """Values of label maps for which no file of categories is there, with the names that are known."""


def split_of(path: str) -> Split | None:
    """The split that a path names: its last part that is a word such as `train`, `train2017`, `instances_val`."""
    words = re.findall(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])", path.lower())
    if not words:
        return None
    return "train" if words[-1].startswith("train") else "val" if words[-1].startswith("val") else "test"
