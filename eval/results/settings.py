"""Settings that determine the results of an evaluation, besides weights and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_ORIGINAL_VALUES = {"shrink": "area", "precision": "fp32"}
"""Values that were fixed before they became settings. Digests omit them, so digests of older results stay valid."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of one evaluated set, as stored with its results."""

    tasks: tuple[str, ...]
    extra_metrics: tuple[str, ...]
    shortest_edge: int
    max_size: int
    shrink: str = "area"
    precision: str = "fp32"
    """Numeric precision of the forward pass."""
    batch_size: int
    limit: int | None
    test_time: Mapping[str, Any]
    """Kind of test-time augmentation, with its settings."""
    postprocess: Mapping[str, Any]
    """Thresholds in `model.postprocess`."""
    weights: str | None
    """SHA-256 of the weights. None if it is not known; earlier versions knew only that of a run's checkpoints."""

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that identify these settings."""
        values = asdict(self)
        for name, value in _ORIGINAL_VALUES.items():
            if values[name] == value:
                del values[name]
        content = json.dumps(values, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]
