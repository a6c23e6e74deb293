"""Fields of JSON documents that mean one thing only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2f.data_pipeline.errors import DataError


def field(entry: Any, name: str, where: str) -> Any:
    """A field that must be there. Raises DataError naming the entry."""
    if not isinstance(entry, dict) or name not in entry:
        raise DataError(f"{where} has no field {name!r}")
    return entry[name]


def read_flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """A field that must be 0, 1, true or false; the text "0" would count as true otherwise. Raises DataError."""
    value = field(entry, name, where)
    if value not in (0, 1):
        raise DataError(f"{where}: {name} is {repr(value)[:40]}; it must be 0, 1, true or false")
    return bool(value)


def stated_flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """A flag that may be missing or null, which is false. Raises DataError as `read_flag` does."""
    return entry.get(name) is not None and read_flag(entry, name, where)
