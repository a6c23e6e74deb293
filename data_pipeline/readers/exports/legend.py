"""Legends of colour maps: text files with one class per line, given by name and colour or by name only."""

from __future__ import annotations

import re
from pathlib import Path

from m2f.data_pipeline.categories import Category, CategoryTable, distinct_color
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.files import read_bytes, require_file

_LINE_PATTERNS = (
    r"(?P<name>[^:#]+):(?P<r>\d+),(?P<g>\d+),(?P<b>\d+):.*",  # labelmap.txt of CVAT and datumaro
    r"(?P<name>[^,]+),\s*(?P<r>\d+),\s*(?P<g>\d+),\s*(?P<b>\d+)",  # class_dict.csv
    r"(?P<r>\d+)\s+(?P<g>\d+)\s+(?P<b>\d+)\s+(?P<name>.+)",  # label_colors.txt of CamVid
    r"(?P<id>\d+)\s*:\s*(?P<name>.+)",  # labels.txt of COCO-Stuff
    r"(?P<id>\d+)\s*,\s*(?P<name>[^,]+)",  # _classes.csv of Roboflow
)
_NAME_PATTERN = r"(?P<name>[^:,]+)"
"""A line of labelme's class_names.txt. Used only if no line of the file has another form."""


def read_legend(path: str) -> CategoryTable:
    """Return the classes of a legend, all as stuff, in file order. Classes without an id are numbered from 0.

    labelme's `_background_` is renamed `background`. Its first line `__ignore__`, which has the number -1, is skipped.

    Raises:
        DataError: the file is missing, a line is invalid, or there is no class.
    """
    require_file(path)
    lines = [line.strip() for line in read_bytes(Path(path)).decode("utf-8-sig", errors="replace").splitlines()]
    rows = [line for line in lines if line and not line.startswith("#")]
    categories: list[Category] = []
    patterns = (
        _LINE_PATTERNS
        if any(re.fullmatch(pattern, row) for pattern in _LINE_PATTERNS for row in rows)
        else (_NAME_PATTERN,)
    )
    if rows and rows[0] == "__ignore__":
        rows = rows[1:]
    for row in rows:
        matched = next((match for pattern in patterns if (match := re.fullmatch(pattern, row))), None)
        if matched is None:
            if row is rows[0] and patterns is _LINE_PATTERNS and not re.search(r"\d", row):
                continue  # header line of a CSV file
            raise DataError(f"{path}: {row[:60]!r} is not a class; use `name:r,g,b::`, `name,r,g,b` or `r g b name`")
        parts = matched.groupdict()
        number = int(parts["id"]) if parts.get("id") else len(categories)
        color = distinct_color(number)
        if parts.get("r"):
            color = (int(parts["r"]), int(parts["g"]), int(parts["b"]))
        if max(color) > 255:
            raise DataError(f"{path}: {row[:60]!r} has a colour above 255")
        name = parts["name"].strip()
        categories.append(Category(number, "background" if name == "_background_" else name, False, color))
    if not categories:
        raise DataError(f"{path} lists no class")
    return CategoryTable(tuple(categories))
