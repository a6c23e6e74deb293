"""Detect pairs of folders with images and maps whose file names match."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from m2f.cluster.own_data.map_values import (
    COLOR_LEGENDS,
    LISTS_BY_VALUE,
    MAX_CLASSES,
    ColoredValue,
    find_repeated_value,
    has_colors,
    read_class_names,
    read_map_values,
    sample_maps,
    values_in,
)
from m2f.cluster.own_data.sets import DataFormat, SourceSet, Split, split_from_path
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.folders import walk_folders
from m2f.data_pipeline.image_file import BrokenImageError, is_image_name, read_header
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.files import files_below
from m2f.data_pipeline.readers.map_reader import OTHER_MAP_ENDINGS
from m2f.data_pipeline.sources import CocoStuffSource, ColorMapSource, HuggingFaceSource, LabelMapSource
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

_LEGENDS = (*COLOR_LEGENDS, "labels.txt")
_CATEGORY_FILES = ("classes.json", "categories.json")
_SUFFIXES = ("_mask", "_L", "_label", "_labels", "_gt", "_seg")
"""Name suffixes of maps that are in the same folder as their images."""
NO_CATEGORY_FILE = ""
"""Placeholder for the path of a category file that is not written yet."""


@dataclass(frozen=True)
class _Pair:
    root: Path
    """Folder in which both folders were found."""
    images: Path
    maps: Path
    suffix: str

    @property
    def split(self) -> Split | None:
        """Split that the folder of the maps names, or else that of the images; None if they name none."""
        splits = (split_from_path(str(folder.relative_to(self.root))) for folder in (self.maps, self.images))
        return next(filter(None, splits), None)

    def map_files(self) -> list[Path]:
        """Return the paths of the maps, sorted. As in the readers, subfolders are included, and PNG has precedence."""
        found = [p for p in files_below(self.maps, "") if _is_map(p.name) and p.stem.endswith(self.suffix)]
        found.sort(key=lambda path: path.suffix.lower() == ".png")
        return sorted({path.with_suffix(""): path for path in found}.values())


def _is_map(name: str) -> bool:
    return name.lower().endswith((".png", *OTHER_MAP_ENDINGS)) and is_image_name(name)


def find_map_formats(folder: Path) -> list[DataFormat]:
    """Return the formats that fit the pairs of image and map folders in `folder`.

    Raises ConfigError for RGB maps without a legend, and for maps with too many values to be classes.
    """
    pairs, unpaired = _find_pairs(folder)
    if not pairs:
        return []
    _require_one_map_folder(pairs)
    formats = _formats_of_pairs(folder, pairs)
    notes = []
    if unpaired:
        listed = format_list(path.relative_to(folder) for path in unpaired)
        notes.append(
            "not used, because no folder has images with the names of these maps, or they are not PNG, TIFF or BMP: "
            f"{listed}"
        )
    if lists := [path.relative_to(folder) for path in files_below(folder, ".txt") if split_from_path(path.stem)]:
        notes.append(f"not used, because folders named train and val divide maps, not lists: {format_list(lists)}")
    return [replace(data_format, notes=(*data_format.notes, *notes)) for data_format in formats]


def _formats_of_pairs(folder: Path, pairs: Sequence[_Pair]) -> list[DataFormat]:
    files = [pair.map_files() for pair in pairs]
    first = files[0][0]
    try:
        mode = read_header(first.read_bytes()).mode
    except BrokenImageError as error:
        raise ConfigError(f"{first}: {error}") from error
    roots = (folder, *dict.fromkeys(parent for pair in pairs for parent in (pair.maps.parent, pair.maps)))
    legend = next((r / n for r in roots for n in _LEGENDS if (r / n).is_file()), None)
    category_file = next((r / n for r in roots for n in _CATEGORY_FILES if (r / n).is_file()), None)
    location = f"{pairs[0].images.name}/ and {pairs[0].maps.name}/"
    if pairs[0].images == pairs[0].maps:
        location = f"{pairs[0].images.name}/ with NAME and NAME{pairs[0].suffix}"
    evidence = f"{format_count(len(pairs), 'pair')} of images and maps, the first {location}"
    if mode not in ("gray", "gray_alpha", "palette"):
        if (legend is not None and legend.name in COLOR_LEGENDS) or any(map(has_colors, sample_maps(files))):
            return _color_map_formats(pairs, legend, category_file, evidence)
        mode = "gray RGB"
    if legend is not None and legend.name == "labels.txt" and _is_coco_stuff(legend):
        sets = [CocoStuffSource(images=str(p.images), labels=str(p.maps), label_names=str(legend)) for p in pairs]
        return [DataFormat("coco_stuff", f"{evidence}, with labels.txt", _source_sets(pairs, sets))]
    found = read_map_values(files, sampled=category_file is not None)
    are_values_named = any((root / name).is_file() for root in roots for name in (*_CATEGORY_FILES, *LISTS_BY_VALUE))
    if not are_values_named and (repeated := find_repeated_value(found)):
        return [_palette_format(pairs, legend, evidence, found, repeated)]
    values = tuple(sorted({value for value, _ in found}))
    is_binary = values == (0, 255)
    void = () if is_binary else _without_classes((255,), category_file)
    sets = [
        LabelMapSource(
            images=str(pair.images),
            labels=str(pair.maps),
            categories=str(category_file or NO_CATEGORY_FILE),
            void=void,
            suffix=pair.suffix,
        )
        for pair in pairs
    ]
    class_values = () if category_file else tuple(value for value in values if value != 255 or is_binary)
    if len(class_values) > MAX_CLASSES:
        raise ConfigError(
            f"{pairs[0].maps}: the maps have {len(class_values)} different values, probably ids of objects, not "
            "classes; write a categories file (docs/datasets.md), or export in another format"
        )
    names, notes = read_class_names(roots, first, class_values) if class_values else ({}, [])
    classes = {value: names.get(value) for value in (*class_values, *names)}
    if 255 in values and 255 in void:
        notes.append("pixels of value 255 have no label (source.void)")
        classes.pop(255, None)
    source_sets = _source_sets(pairs, sets)
    classes = dict(sorted(classes.items()))
    return [DataFormat("label_maps", f"{evidence}: {mode} maps", source_sets, classes, tuple(notes))]


def _color_map_formats(
    pairs: Sequence[_Pair], legend: Path | None, category_file: Path | None, evidence: str
) -> list[DataFormat]:
    formats = []
    if legend is not None:
        colors = [
            ColorMapSource(images=str(p.images), labels=str(p.maps), legend=str(legend), suffix=p.suffix) for p in pairs
        ]
        formats.append(
            DataFormat("color_maps", f"{evidence}: RGB maps, with {legend.name}", _source_sets(pairs, colors))
        )
    if category_file is not None and not any(pair.suffix for pair in pairs):
        ids = [
            HuggingFaceSource(
                images=str(p.images),
                annotations=str(p.maps),
                categories=str(category_file),
                void=_without_classes(HuggingFaceSource.void, category_file),
            )
            for p in pairs
        ]
        formats.append(
            DataFormat("huggingface", f"{evidence}: RGB maps, with {category_file.name}", _source_sets(pairs, ids))
        )
    if not formats:
        raise ConfigError(
            f"{pairs[0].maps} contains RGB maps without a legend of their colours; add class_dict.csv beside it, with "
            "one line for each class, for example `road,128,64,128` (name and colour). If red is the class and green "
            "the object, add classes.json instead (docs/datasets.md)"
        )
    return formats


def _palette_format(
    pairs: Sequence[_Pair],
    legend: Path | None,
    evidence: str,
    found: Set[ColoredValue],
    repeated: tuple[ColoredValue, ColoredValue],
) -> DataFormat:
    """Return the format of maps with different palettes, which is read by colour.

    Tools that reduce the number of colours write such maps. Raises ConfigError if no legend names all colours.

    Args:
        pairs: pairs of folders.
        legend: file with the names of classes; None if there is no such file.
        evidence: text for the user about the pairs.
        found: values in the maps with their colours.
        repeated: a value with two of its colours.
    """
    files = [path for pair in pairs for path in pair.map_files()]
    if legend is not None and legend.name in COLOR_LEGENDS and all(path.suffix.lower() == ".png" for path in files):
        named = {category.color for category in read_legend(str(legend)).categories}
        if {color for _, color in found} <= named:
            return replace(
                _color_map_formats(pairs, legend, None, evidence)[0],
                evidence=f"{evidence}: palette maps whose palettes differ, with {legend.name}",
            )
    one, other = (next(path for path in files if entry in values_in(path)) for entry in repeated)
    raise ConfigError(
        f"the palettes of {one} and {other} differ: value {repeated[0][0]} is {repeated[0][1]} in the first, "
        f"{repeated[1][1]} in the second. If colours are classes, add a legend of all colours "
        f"({', '.join(COLOR_LEGENDS)}) to PNG maps. If values are classes, save the maps as grey images"
    )


def _without_classes(void: tuple[int, ...], category_file: Path | None) -> tuple[int, ...]:
    """Return the void values that are not labels of classes in the category file."""
    try:
        table = read_category_file(str(category_file), (), things=False)[0] if category_file else None
    except DataError:  # the reader reports it
        return void
    return tuple(value for value in void if table is None or value not in table.by_id)


def _require_one_map_folder(pairs: Sequence[_Pair]) -> None:
    """Raise ConfigError if several folders have maps of the images in one folder, such as class and object maps."""
    maps: dict[Path, list[str]] = {}
    for pair in pairs:
        maps.setdefault(pair.images, []).append(str(pair.maps.relative_to(pair.root)))
    for images, names in maps.items():
        if len(names) > 1:
            raise ConfigError(
                f"{images} has maps in {len(names)} folders: {format_list(names)}. Keep the folder whose values are "
                f"classes, and move the others out of {pairs[0].root}; or divide the images like the maps"
            )


def _source_sets(
    pairs: Sequence[_Pair], sources: Sequence[LabelMapSource | ColorMapSource | CocoStuffSource | HuggingFaceSource]
) -> tuple[SourceSet, ...]:
    return tuple(SourceSet(pair.split, source) for pair, source in zip(pairs, sources, strict=True))


def _is_coco_stuff(legend: Path) -> bool:
    try:
        return read_legend(str(legend)).categories[0].name == "unlabeled"
    except DataError:
        return False


def _find_pairs(folder: Path) -> tuple[list[_Pair], list[Path]]:
    """Return pairs of folders in which at least 90 % of the maps are named after an image, and unpaired map folders.

    One folder may hold both images and maps. If several folders contain the images, because splits repeat names, the
    one nearest to the maps is used.
    """
    stems: dict[Path, dict[str, str]] = {}
    for parent, files in sorted(walk_folders(str(folder))):
        found = {Path(name).stem: name for name in sorted(files) if is_image_name(os.path.join(parent, name))}
        if found:
            stems[Path(parent)] = found
    like_maps = {path for path, names in stems.items() if _looks_like_maps(path.relative_to(folder), names)}
    images_below = {path: names for path, names in stems.items() if path not in like_maps}
    pairs, unpaired = [], []
    for maps, names in stems.items():
        if (suffix := _map_suffix_in_folder(names)) is not None:
            pairs.append(_Pair(folder, maps, maps, suffix))
            continue
        if maps not in like_maps:
            continue
        if maps.name == "SegmentationObject" and maps.with_name("SegmentationClass") in stems:
            continue  # the values of these maps are object numbers, not classes
        fitting = []
        for images, others in images_below.items() if all(map(_is_map, names.values())) else ():
            if (suffix := _map_suffix(others, names)) is not None:
                fitting.append(_Pair(folder, images, maps, suffix))
        if fitting:
            pairs.append(max(fitting, key=_nearness))
        else:
            unpaired.append(maps)
    if not pairs and (matched := _find_nested_pairs(folder, stems) or _find_pairs_by_content(folder, stems)):
        return matched, []
    return pairs, unpaired


def _find_pairs_by_content(folder: Path, stems: Mapping[Path, Mapping[str, str]]) -> list[_Pair]:
    """Return pairs of folders with equal stems of which only one has grey or palette maps, whatever their names are."""
    maps = {path for path, names in stems.items() if _has_one_channel([path / name for name in names.values()])}
    pairs: list[_Pair] = []
    for path in sorted(maps):
        names = stems[path].keys()
        fitting = [_Pair(folder, p, path, "") for p in stems if p not in maps and names <= stems[p].keys()]
        pairs += [max(fitting, key=_nearness)] if fitting else []
    return pairs


def _has_one_channel(paths: Sequence[Path]) -> bool:
    """Return whether all files have the ending of a map, and the first 20 have one channel."""
    if not all(_is_map(path.name) for path in paths):
        return False
    try:
        return all(read_header(path.read_bytes()).mode in ("gray", "palette") for path in paths[:20])
    except (OSError, BrokenImageError):
        return False


def describe_unpaired_maps(folder: Path) -> str:
    """Return why the first folder that is named like maps has no images, as a sentence; empty if there is none."""
    for parent, files in sorted(walk_folders(str(folder))):
        path = Path(parent).relative_to(folder)
        if not any(_is_named_like_maps(Path(part)) for part in path.parts):
            continue
        if num_maps := sum(map(_is_map, files)):
            return (
                f" {path}/ has {format_count(num_maps, 'map')}, but no folder has images with their names; if the "
                "export lacks the images, copy them to images/."
            )
        for kind, endings in (("JPEG", (".jpg", ".jpeg")), ("WebP", (".webp",)), ("GIF", (".gif",))):
            if count := sum(name.lower().endswith(endings) for name in files):
                reason = "GIF files are not read" if kind == "GIF" else f"{kind} changes values"
                listed = f" {path}/ has {format_count(count, f'{kind} file')}"
                return f"{listed}; if these are maps, export them as PNG, because {reason}."
    return ""


def _find_nested_pairs(folder: Path, stems: Mapping[Path, Mapping[str, str]]) -> list[_Pair]:
    """Return pairs of folders whose images and maps are in subfolders of the same names, for example of patients.

    The outermost folder that is named like maps is paired, or its subfolders that are named after splits.
    """
    parts = {part for path in stems for part in path.relative_to(folder).parts}
    if not any(_is_named_like_maps(Path(part)) for part in parts):
        return []  # joining all names is slow, and pointless if no folder is named like maps
    nested: dict[Path, dict[str, str]] = {}
    for parent, names in stems.items():
        for root in (path for path in (parent, *parent.parents) if path.is_relative_to(folder)):
            below = parent.relative_to(root)
            nested.setdefault(root, {}).update({(below / stem).as_posix(): name for stem, name in names.items()})
    pairs: list[_Pair] = []
    for maps in sorted(nested):
        if not _is_named_like_maps(maps.relative_to(folder)) or not all(map(_is_map, nested[maps].values())):
            continue
        inside = (str(path.relative_to(maps)) for path in nested if path.is_relative_to(maps))
        if any(maps.is_relative_to(pair.maps) for pair in pairs) or any(map(split_from_path, inside)):
            continue
        fitting = []
        for images, names in nested.items():
            differing = images.relative_to(os.path.commonpath((images, maps)))
            if not images.is_relative_to(maps) and not any(_is_named_like_maps(Path(part)) for part in differing.parts):
                suffix = _map_suffix(names, nested[maps])
                fitting += [] if suffix is None else [_Pair(folder, images, maps, suffix)]
        pairs += [max(fitting, key=_nearness)] if fitting else []
    return pairs


def _nearness(pair: _Pair) -> tuple[bool, int]:
    """Return a key that ranks pairs: equal splits first, then the length of the common path."""
    images, maps = str(pair.images), str(pair.maps)
    return split_from_path(images) == split_from_path(maps), len(os.path.commonpath((images, maps)))


def _map_suffix_in_folder(names: dict[str, str]) -> str | None:
    """Return the maps' name suffix if about half of the files in a folder are maps of the other half, else None."""
    for suffix in _SUFFIXES:
        maps = [stem for stem in names if stem.endswith(suffix) and _is_map(names[stem])]
        partners = sum(stem.removesuffix(suffix) in names for stem in maps)
        if maps and partners == len(maps) and 2 * partners >= 0.9 * len(names):
            return suffix
    return None


def _looks_like_maps(folder: Path, names: dict[str, str]) -> bool:
    """Return whether a folder or its first file is named like maps. Contents do not help: images may also be grey.

    The path of the folder is relative to the user's folder, whose own name, such as `segmentation`, says nothing.
    """
    return _is_named_like_maps(folder) or next(iter(names)).endswith(("_mask", "_L"))


def _is_named_like_maps(folder: Path) -> bool:
    """Return whether a folder is named like maps, or its parent if the folder is named after a split."""
    words = r"mask|label|annot|(?<![a-z])ann(?![a-z])|seg|gt|ground|stuff|map|target"  # ann_dir of mmsegmentation
    name = "/".join(folder.parts[-2:]) if split_from_path(folder.name) else folder.name
    return re.search(words, name.lower()) is not None


def _map_suffix(images: dict[str, str], maps: dict[str, str]) -> str | None:
    """Return the part of the maps' names after the stem of the image, or None if fewer than 90 % of the maps match."""
    first = next(iter(maps))
    for stem in sorted(images, key=len, reverse=True):
        if first.startswith(stem):
            suffix = first[len(stem) :]
            fitting = sum(name.endswith(suffix) and name.removesuffix(suffix) in images for name in maps)
            if fitting >= 0.9 * len(maps):
                return suffix
    return None
