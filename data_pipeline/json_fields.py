"""Checked access to fields of JSON documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2f.data_pipeline.errors import DataError


def field(entry: Any, name: str, where: str) -> Any:
    """Return a required field of a JSON object.

    Raises:
        DataError: `entry` is not an object or lacks the field. The message begins with `where`.
    """
    if not isinstance(entry, dict) or name not in entry:
        raise DataError(f"{where}: the field {name!r} is missing")
    return entry[name]


def read_flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """Return a required flag as bool.

    Raises:
        DataError: the field is missing or is not 0, 1, true or false. The text "0" is refused, because `bool` would
            make it true.
    """
    value = field(entry, name, where)
    if value not in (0, 1):
        raise DataError(f"{where}: {name} is {repr(value)[:40]}; it must be 0, 1, true or false")
    return bool(value)


def optional_flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """Return an optional flag as bool; missing or null is False. Raises DataError like `read_flag`."""
    return entry.get(name) is not None and read_flag(entry, name, where)
