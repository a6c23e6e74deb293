"""Validate keys that come from files and become part of a path or URL.

Sample keys, data set names, names of checkpoint files and names of masks in annotation files all name files inside
some folder. The check prevents such a name from pointing outside that folder.
"""

from __future__ import annotations

import re

from m2f.data_pipeline.errors import DataError

MAX_KEY_LENGTH = 1000
"""Longest key in characters; file systems and object stores limit a path to 1024 to 4096 bytes."""

_SIMPLE_KEY = re.compile(r"[\w-][\w.-]{0,200}", re.ASCII)  # fast path: matches most keys
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]")  # control characters, surrogates, backslash


def key_problem(key: object) -> str | None:
    """Return why `key` is invalid, as the end of a sentence, or None if it is valid.

    A valid key may be a relative path with `/`; none of its parts is empty, `.` or `..`.
    """
    if isinstance(key, str) and _SIMPLE_KEY.fullmatch(key):
        return None
    if not isinstance(key, str) or not key:
        return "is not a non-empty string"
    if len(key) > MAX_KEY_LENGTH:
        return f"has {len(key)} characters, more than {MAX_KEY_LENGTH}"
    if match := _FORBIDDEN.search(key):
        return f"contains the character {match[0]!a}"
    if not {"", ".", ".."}.isdisjoint(key.split("/")):
        return "is not a path inside its folder"
    return None


def check_key(key: object, where: str) -> str:
    """Return `key` as a str. Raises DataError if it is invalid; the message begins with `where`."""
    if (problem := key_problem(key)) is not None:
        raise DataError(f"{where}: the name {key!a:.100} {problem}; rename it")
    assert isinstance(key, str)
    return key
