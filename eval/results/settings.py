"""What besides weights and data decides the numbers of an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FIRST = {"shrink": "area", "precision": "fp32"}
"""What there was alone when the first results were named: no part of their digests."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of one evaluated set, as they are stored with its results."""

    tasks: tuple[str, ...]
    extra_metrics: tuple[str, ...]
    shortest_edge: int
    max_size: int
    shrink: str = "area"
    precision: str = "fp32"
    """Numbers of the forward pass."""
    batch_size: int
    limit: int | None
    test_time: Mapping[str, Any]
    """Form of test-time augmentation, with its settings."""
    postprocess: Mapping[str, Any]
    """Thresholds of `model.postprocess`."""
    weights: str | None
    """SHA-256 of the weights as the checkpoint's manifest states it; None for weights that are no checkpoint's."""

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name these settings, equal for equal settings."""
        values = asdict(self)
        for name, value in _FIRST.items():
            if values[name] == value:
                del values[name]
        content = json.dumps(values, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]
