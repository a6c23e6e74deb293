"""The result of a check of `m2f doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]
HERE = "here"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    detail: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""
    where: str = HERE
    """Node of a cluster."""
