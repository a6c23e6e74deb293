"""Contents of results.json, with checked types."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from m2f.cluster.compare.errors import CompareError
from m2f.data_pipeline.documents import parse_json

CLASS_METRICS = ("PQ", "AP", "IoU")
"""Columns of per_class in results.json that are compared for each class."""
_TYPES = {
    "step": (int, type(None)),
    "fingerprint": (str,),
    "subset": (str, type(None)),
    "num_images": (int,),
    "metrics": (dict,),
    "per_class": (list,),
    "settings": (dict, type(None)),
}
_CLASS_TYPES = {"id": (int,), "name": (str,), "is_thing": (bool,)}
_MAX_STEP = 2**63
"""Limit of steps: MLflow stores them as 64-bit integers."""


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """Contents of results.json of one evaluated set at one step."""

    step: int | None
    """Optimizer step; None for weights that are not a checkpoint of the run."""
    fingerprint: str
    """Fingerprint of the evaluated data set."""
    subset: str | None
    """Description of the subset that was evaluated; None for the whole set."""
    num_images: int
    metrics: Mapping[str, float | None]
    per_class: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] | None = None
    """Settings of the evaluation, which influence the numbers; None if the file does not record them."""


def parse_results(payload: bytes | str, where: str) -> SetResult:
    """Parse a results.json. Raises CompareError if it is damaged. The message names the file, which is `where`."""
    try:
        content = parse_json(payload)
        values = {field.name: content[field.name] for field in fields(SetResult) if field.name != "settings"}
        values["settings"] = content.get("settings")
        _check_types(values, _TYPES)
        if not 0 <= (values["step"] or 0) < _MAX_STEP:
            raise ValueError(f"`step` is {values['step']!r:.40}")
        _check_numbers(values["metrics"])
        for row in values["per_class"]:
            if not isinstance(row, dict) or "name" not in row:
                raise ValueError(f"`per_class` has {row!r:.40}")
            _check_types(row, _CLASS_TYPES)
            _check_numbers({name: row.get(name) for name in CLASS_METRICS})
        return SetResult(**values)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CompareError(f"{where} is damaged ({error}); delete it, and evaluate again") from error


def _check_types(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    for name, allowed in types.items():
        if name in values and type(values[name]) not in allowed:  # the type of True is not int
            raise ValueError(f"`{name}` is {values[name]!r:.40}")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        is_number = type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
        if value is not None and not is_number:
            raise ValueError(f"`{name}` is {value!r:.40}")
