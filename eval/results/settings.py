"""What besides weights and data decides the numbers of an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of one evaluated set, as they are stored with its results."""

    tasks: tuple[str, ...]
    extra_metrics: tuple[str, ...]
    shortest_edge: int
    max_size: int
    shrink: str = "area"
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
        if values["shrink"] == "area":  # the only one when the first results were named
            del values["shrink"]
        content = json.dumps(values, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]
