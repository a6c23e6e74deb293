"""What a key may be that comes from a file: one rule for whatever becomes part of a path or URL.

Sample keys, names of a checkpoint's files, of data sets and of masks in annotation files name files below a folder of
ours. Whoever wrote the file that they come from must not choose a place outside that folder.
"""

from __future__ import annotations

import re

from m2f.data_pipeline.errors import DataError

MAX_KEY = 1000
"""Characters; file systems and object stores end a path at 1024 to 4096 bytes."""

_USUAL = re.compile(r"[\w-][\w.-]{0,200}", re.ASCII)  # most keys, recognised in one match
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]")  # control characters, bytes that are no text, backslash


def key_problem(key: object) -> str | None:
    """Why `key` may not be used, as the end of a sentence; None where it may.

    It may be a relative path of `/`, whose parts are neither empty nor `.` nor `..`.
    """
    if isinstance(key, str) and _USUAL.fullmatch(key):
        return None
    if not isinstance(key, str) or not key:
        return "is not a text with at least one character"
    if len(key) > MAX_KEY:
        return f"has {len(key)} characters, more than {MAX_KEY}"
    if found := _FORBIDDEN.search(key):
        return f"holds the character {found[0]!a}"
    if not {"", ".", ".."}.isdisjoint(key.split("/")):
        return "is not a path inside its folder"
    return None


def check_key(key: object, where: str) -> str:
    """`key`, as a str. Raises DataError beginning with `where` for one that may not be used."""
    if (problem := key_problem(key)) is not None:
        raise DataError(f"{where}: the name {key!a:.100} {problem}; rename it there")
    assert isinstance(key, str)
    return key
