"""Detect the format of pairs of folders with images and maps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from m2f.cluster.own_data.map_values import (
    COLOR_LEGENDS,
    LISTS_BY_VALUE,
    MAX_CLASSES,
    ColoredValue,
    colors_in,
    describe_repeated_value,
    find_repeated_value,
    has_colors,
    read_class_names,
    read_map_values,
    sample_maps,
    values_in,
)
from m2f.cluster.own_data.pair_folders import Pair, find_pairs
from m2f.cluster.own_data.sets import DataFormat, SourceSet, split_from_path
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import BrokenImageError, read_header
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.readers.exports.legend import read_legend
from m2f.data_pipeline.readers.files import files_below
from m2f.data_pipeline.sources import CocoStuffSource, ColorMapSource, HuggingFaceSource, LabelMapSource
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

_LEGENDS = (*COLOR_LEGENDS, "labels.txt")
_CATEGORY_FILES = ("classes.json", "categories.json")
_MIN_BLURRED_VALUES = 16
"""Smallest number of values of blurred masks. JPEG creates dozens of values; a low limit would refuse class maps."""
_NUM_NUMBERED_MAPS = 20
"""Number of maps whose values or colours are listed or compared: enough to differ in their numbers of objects, and read
in a second."""
NO_CATEGORY_FILE = ""
"""Placeholder for the path of a category file that is not written yet."""


def find_map_formats(folder: Path) -> list[DataFormat]:
    """Return the formats that fit the pairs of image and map folders in `folder`.

    Raises ConfigError for RGB maps without a legend, and for maps with too many values to be classes.
    """
    pairs, unpaired = find_pairs(folder)
    if not pairs:
        return []
    _require_one_map_folder(pairs)
    formats = _formats_of_pairs(folder, pairs)
    notes = [
        f"the images are those in {pair.images.relative_to(folder)}/, but {format_list(others)} may have them as well; "
        "check with m2f preview, and move folders that are not to be used"
        for pair in pairs
        if (others := [f"{path.relative_to(folder)}/" for path in pair.equal])
    ]
    if unpaired:
        listed = format_list(path.relative_to(folder) for path in unpaired)
        notes.append(
            "not used, because no folder has images with the names of these maps, or they are not PNG, TIFF or BMP: "
            f"{listed}"
        )
    if lists := [path.relative_to(folder) for path in files_below(folder, ".txt") if split_from_path(path.stem)]:
        notes.append(f"not used, because folders named train and val divide maps, not lists: {format_list(lists)}")
    return [replace(data_format, notes=(*data_format.notes, *notes)) for data_format in formats]


def _formats_of_pairs(folder: Path, pairs: Sequence[Pair]) -> list[DataFormat]:
    files = [pair.map_files() for pair in pairs]
    first = files[0][0]
    try:
        mode = read_header(first.read_bytes()).mode
    except BrokenImageError as error:
        raise ConfigError(f"{first}: {error}") from error
    roots = (folder, *dict.fromkeys(parent for pair in pairs for parent in (pair.maps.parent, pair.maps)))
    legend = next((r / n for r in roots for n in _LEGENDS if (r / n).is_file()), None)
    category_file = next((r / n for r in roots for n in _CATEGORY_FILES if (r / n).is_file()), None)
    evidence = f"{format_count(len(pairs), 'pair')} of images and maps, the first {_location(folder, pairs[0])}"
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
    if not are_values_named:
        _refuse_blurred_masks(pairs[0].maps, values)
    is_binary = values == (0, 255)
    void = () if is_binary else _without_classes((255,), category_file)
    sets = [
        LabelMapSource(
            images=str(pair.images),
            labels=str(pair.maps),
            categories=str(category_file or NO_CATEGORY_FILE),
            void=void,
            suffix=pair.suffix,
            image_suffix=pair.image_suffix,
        )
        for pair in pairs
    ]
    class_values = () if category_file else tuple(value for value in values if value != 255 or is_binary)
    if len(class_values) > MAX_CLASSES:
        raise ConfigError(
            f"{pairs[0].maps}: the maps have {len(class_values)} different values, probably ids of objects, not "
            "classes; write a categories file (docs/datasets.md), or export in another format. For ids of objects, "
            "docs/own_data.md has a script (masks to convert)"
        )
    names, notes = read_class_names(roots, first, class_values) if class_values else ({}, [])
    notes += [] if category_file or names else _object_number_notes(files)
    classes = {value: names.get(value) for value in (*class_values, *names)}
    if 255 in values and 255 in void:
        notes.append("pixels of value 255 have no label (source.void)")
        classes.pop(255, None)
    source_sets = _source_sets(pairs, sets)
    classes = dict(sorted(classes.items()))
    return [DataFormat("label_maps", f"{evidence}: {mode} maps", source_sets, classes, tuple(notes))]


def _location(folder: Path, pair: Pair) -> str:
    """Return the folders of a pair relative to the user's folder, and the form of the names if they differ."""
    images, maps = (f"{path.relative_to(folder)}/" for path in (pair.images, pair.maps))
    if pair.images == pair.maps and not pair.suffix and not pair.image_suffix:
        maps += " with equal names"
    elif pair.images == pair.maps or pair.image_suffix:
        maps += f" with NAME{pair.image_suffix} and NAME{pair.suffix}"
    return maps if pair.images == pair.maps else f"{images} and {maps}"


def _color_map_formats(
    pairs: Sequence[Pair], legend: Path | None, category_file: Path | None, evidence: str
) -> list[DataFormat]:
    formats = []
    if legend is not None:
        colors = [
            ColorMapSource(
                images=str(p.images),
                labels=str(p.maps),
                legend=str(legend),
                suffix=p.suffix,
                image_suffix=p.image_suffix,
            )
            for p in pairs
        ]
        formats.append(
            DataFormat("color_maps", f"{evidence}: RGB maps, with {legend.name}", _source_sets(pairs, colors))
        )
    if category_file is not None and not any(pair.suffix or pair.image_suffix for pair in pairs):
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
        colors = colors_in(pairs[0].map_files()[:_NUM_NUMBERED_MAPS])
        count = format_count(len(colors), "colour")
        raise ConfigError(
            f"{pairs[0].maps} contains RGB maps without a legend of their colours; add class_dict.csv beside it, with "
            "one line for each class, for example `road,128,64,128` (name and colour). If red is the class and green "
            f"the object, add classes.json instead (docs/datasets.md). The first maps have {count}: "
            f"{format_list(colors, 20)}"
        )
    return formats


def _palette_format(
    pairs: Sequence[Pair],
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
    raise ConfigError(
        f"{describe_repeated_value(files, repeated)}. If colours are classes, add a legend of all colours "
        f"({', '.join(COLOR_LEGENDS)}) to PNG maps. If values are classes, save the maps as grey images"
    )


def _without_classes(void: tuple[int, ...], category_file: Path | None) -> tuple[int, ...]:
    """Return the void values that are not labels of classes in the category file."""
    try:
        table = read_category_file(str(category_file), (), things=False)[0] if category_file else None
    except DataError:  # the reader reports it
        return void
    return tuple(value for value in void if table is None or value not in table.by_id)


def _refuse_blurred_masks(maps: Path, values: Sequence[int]) -> None:
    """Raise ConfigError if values are those of masks of 0 and 255 that JPEG or resizing has blurred.

    Blurred masks have many values near both ends. Class maps have few values above 223, such as 254 and 255 for void.
    """
    near_white = sum(224 <= value < 255 for value in values)
    if len(values) >= _MIN_BLURRED_VALUES and {values[0], values[-1]} == {0, 255} and near_white >= 3:
        raise ConfigError(
            f"{maps}: the maps have {len(values)} different values from 0 to 255. They are probably masks of 0 and 255 "
            "that JPEG or resizing has changed, or ids of objects. docs/own_data.md has scripts for both (masks to "
            "convert)"
        )


def _object_number_notes(files: Sequence[Sequence[Path]]) -> list[str]:
    """Return a note if the values of each map are 1 to n, with another n in each map, as numbers of objects are."""
    sample = [{value for value, _ in values_in(path)} - {0} for path in sample_maps(files)[:_NUM_NUMBERED_MAPS]]
    counts = {len(values) for values in sample}
    if len(counts) < 2 or max(counts) < 3 or any(values != set(range(1, len(values) + 1)) for values in sample):
        return []
    return [
        f"the values of each map are 1 to n, with n up to {max(counts)}. If they number objects instead of classes, "
        "convert the maps with the script in docs/own_data.md (masks to convert)"
    ]


def _require_one_map_folder(pairs: Sequence[Pair]) -> None:
    """Raise ConfigError if several folders have maps of the images in one folder, such as class and object maps."""
    by_images: dict[Path, list[Pair]] = {}
    for pair in pairs:
        by_images.setdefault(pair.images, []).append(pair)
    for images, several in by_images.items():
        if len(several) == 1:
            continue
        names = format_list(pair.maps.relative_to(pair.root) for pair in several)
        if all(len(values_in(path)) <= 2 for pair in several for path in pair.map_files()[:_NUM_NUMBERED_MAPS]):
            remedy = (
                "Each seems to have the masks of one class: combine them with the script in docs/own_data.md (masks to "
                "convert)"
            )
        else:
            remedy = (
                f"Keep the folder whose values are classes, and move the others out of {pairs[0].root}; or divide the "
                "images like the maps"
            )
        raise ConfigError(f"{images} has maps in {len(several)} folders: {names}. {remedy}")


def _source_sets(
    pairs: Sequence[Pair], sources: Sequence[LabelMapSource | ColorMapSource | CocoStuffSource | HuggingFaceSource]
) -> tuple[SourceSet, ...]:
    return tuple(SourceSet(pair.split, source) for pair, source in zip(pairs, sources, strict=True))


def _is_coco_stuff(legend: Path) -> bool:
    try:
        return read_legend(str(legend)).categories[0].name == "unlabeled"
    except DataError:
        return False
