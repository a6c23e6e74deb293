"""Result of a check of `m2f doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]
THIS_MACHINE = "here"


@dataclass(frozen=True)
class Finding:
    """Result of one check, with a remedy if it did not pass."""

    check: str
    state: State
    detail: str
    remedy: str = ""
    """What the user should do; empty if nothing is needed."""
    where: str = THIS_MACHINE
    """Address of the checked node, `cluster` for a check of the whole cluster, or THIS_MACHINE without a cluster."""
