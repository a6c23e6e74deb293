"""Read the values of maps, the colours of their palettes, and the class names that files state for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from m2f.cluster.terminal import Progress
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.map_reader import read_color_map, read_index_map
from m2f.model.errors import ConfigError

COLOR_LEGENDS = ("labelmap.txt", "class_dict.csv", "label_colors.txt")
"""Files with the names of classes and their colours."""
_NAMES_BY_VALUE_FILE = "id2label.json"
"""File of Hugging Face: a JSON object with the class name of each map value."""
_NNUNET_FILE = "dataset.json"
"""File of nnU-Net with an object `labels` of class names and map values."""
LISTS_BY_VALUE = (_NAMES_BY_VALUE_FILE, "_classes.csv")
"""Files that state the map value of each class, so that colours do not matter."""
_NAME_LISTS = ("_classes.csv", "class_names.txt", "classes.txt", "labels.txt")
"""Files with the class names by map value.

The file states each value (Roboflow), or the value is the number of the line, counted from 0 (labelme).
"""
_NUM_SAMPLED_MAPS = 200
"""Number of maps per pair whose values decide if all maps are read: enough to show ids of objects, read in seconds."""
MAX_CLASSES = 64
"""Largest number of values that count as classes without a category file. More are probably ids of objects."""
_MAX_PIXELS = 10**9
"""Limit of a map in pixels, only against damaged headers: `max_pixels` of the data set applies later."""
_MAX_PALETTE_PIXELS = 89_000_000
"""Largest map whose palette is read, because Pillow warns about larger images or refuses them."""
ColoredValue = tuple[int, tuple[int, ...] | None]
"""A value in a map and its colour (R, G, B) in the palette of the map, or None if the palette has no such colour."""


def read_map_values(files: Sequence[Sequence[Path]], *, sampled: bool) -> Set[ColoredValue]:
    """Return the values in the maps of all pairs of folders.

    Unreadable maps are left out, because the survey reports them as faults.

    A class may occur in very few maps, so all maps are read, with two exceptions. At most `_NUM_SAMPLED_MAPS` evenly
    spaced maps per pair are read if these have too many values to be classes. The same holds if `sampled` is set and
    they have several values.
    """
    sample = sample_maps(files)
    values = set[ColoredValue]().union(*map(values_in, sample))
    num_values = len({value for value, _ in values})
    rest = sorted({path for paths in files for path in paths} - set(sample))
    if rest and num_values <= (1 if sampled else MAX_CLASSES + 1):
        with ThreadPoolExecutor() as pool, Progress("reading the values of all maps", len(rest), "maps") as progress:
            for found in pool.map(values_in, rest):
                values |= found
                progress.advance(1)
    if not values:
        read_index_map(sample[0], _MAX_PIXELS)  # raises the error of the first map
    return values


def sample_maps(files: Sequence[Sequence[Path]]) -> list[Path]:
    """Return at most `_NUM_SAMPLED_MAPS` evenly spaced maps per pair of folders."""
    return [path for paths in files for path in paths[:: -(-len(paths) // _NUM_SAMPLED_MAPS)]]


def has_colors(path: Path) -> bool:
    """Return whether a map is in colour; False if it cannot be read."""
    try:
        ids = read_color_map(path, _MAX_PIXELS)
    except DataError:
        return False
    return bool((ids != (ids & 255) * np.uint32(0x010101)).any())


def colors_in(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Return the colours (R, G, B) in colour maps, those in most maps first. Unreadable maps are left out."""
    counts = Counter[int]()
    for path in files:
        with suppress(DataError):
            counts.update(np.unique(read_color_map(path, _MAX_PIXELS)).tolist())
    return [(value & 255, value >> 8 & 255, value >> 16) for value, _ in counts.most_common()]


def values_in(path: Path) -> Set[ColoredValue]:
    """Return the values in a map; an empty set if it cannot be read."""
    try:
        pixels = read_index_map(path, _MAX_PIXELS)
    except DataError:
        return set()
    values = np.flatnonzero(np.bincount(pixels.ravel())).tolist()
    palette = _palette(path) if pixels.size <= _MAX_PALETTE_PIXELS else []
    return {(value, palette[value] if value < len(palette) else None) for value in values}


def read_class_names(roots: Sequence[Path], first: Path, values: Sequence[int]) -> tuple[Mapping[int, str], list[str]]:
    """Return the class names by map value, and a note on each list of names that is read or not used.

    A list of names is used only if it names all values, because others may lack the background.

    Args:
        roots: folders that may have such a list.
        first: path of a map.
        values: values that are classes.
    """
    notes = []
    files = (_NAMES_BY_VALUE_FILE, _NNUNET_FILE, *_NAME_LISTS, *COLOR_LEGENDS)
    for path in (root / name for root in roots for name in files):
        if path.name in (_NAMES_BY_VALUE_FILE, _NNUNET_FILE):
            if (stated := _read_names_by_value(path)) is not None:
                return stated, notes
        elif path.is_file():
            names = _read_name_list(path, first)
            if names.keys() >= set(values):
                first_name = f"value {values[0]} is {names[values[0]]!r}"  # shows whether the background is named
                return names, [*notes, f"the class names come from {path.name}: {first_name}"]
            listed = os.path.relpath(path, roots[0])
            notes.append(f"not used, because it does not name all values of the maps: {listed}")
    return {}, notes


def _read_name_list(path: Path, first: Path) -> dict[int, str]:
    """Return the class names by map value of a text file; an empty dict if it has another form.

    Colours stand for the values with these colours in the palette of the map `first`.
    """
    try:
        categories = read_legend(str(path)).categories
    except DataError:
        return {}
    if path.name in COLOR_LEGENDS:
        palette = _palette(first)
        return {palette.index(c.color): c.name for c in categories if c.color in palette}
    return {category.id: category.name for category in categories}


def _palette(path: Path) -> list[tuple[int, ...]]:
    """Return the colours (R, G, B) of a map's palette by index; an empty list if it has none."""
    with Image.open(path) as image:
        values = image.getpalette() or []
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))


def _read_names_by_value(path: Path) -> dict[int, str] | None:
    """Read the class names by map value. Return None if the file does not exist or does not map values to names."""
    try:
        document = parse_json(path.read_bytes())
    except (OSError, DocumentError):
        return None
    if path.name == _NNUNET_FILE:
        document = document.get("labels") if isinstance(document, dict) else None
        if isinstance(document, dict) and all(isinstance(value, int) for value in document.values()):
            document = {str(value): name for name, value in document.items()}
    if not isinstance(document, dict) or not all(key.isdecimal() and int(key) < 65536 for key in document):
        return None
    return {int(key): str(name) for key, name in document.items()}


def find_repeated_value(found: Set[ColoredValue]) -> tuple[ColoredValue, ColoredValue] | None:
    """Return the smallest value that has different colours in two palettes, with two of its colours; None if none."""
    colored = sorted((value, color) for value, color in found if color is not None)
    return next(((one, other) for one, other in pairwise(colored) if one[0] == other[0]), None)


def describe_repeated_value(files: Sequence[Path], repeated: tuple[ColoredValue, ColoredValue]) -> str:
    """Return which two of the maps have different colours for a value, as found by `find_repeated_value`."""
    one, other = (next(path for path in files if entry in values_in(path)) for entry in repeated)
    return (
        f"the palettes of {one} and {other} differ: value {repeated[0][0]} is {repeated[0][1]} in the first, "
        f"{repeated[1][1]} in the second"
    )


def require_equal_palettes(files: Sequence[Sequence[Path]]) -> None:
    """Raise ConfigError if the palettes of class maps differ, because their values are then not classes.

    Args:
        files: paths of the maps in each folder, of which `_NUM_SAMPLED_MAPS` per folder are read.
    """
    sample = sample_maps(files)
    if repeated := find_repeated_value(set[ColoredValue]().union(*map(values_in, sample))):
        raise ConfigError(
            f"{describe_repeated_value(sample, repeated)}. Export RGB maps with a legend of all colours "
            f"({', '.join(COLOR_LEGENDS)}) instead. If values are classes, save the maps as grey images"
        )
