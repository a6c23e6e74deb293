"""Detect the format of a folder of user data, and state the evidence. This module writes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from m2f.cluster.own_data.hints import describe_public_data, describe_unsupported
from m2f.cluster.own_data.map_pairs import find_map_formats
from m2f.cluster.own_data.map_values import require_equal_palettes
from m2f.cluster.own_data.sets import DataFormat, SourceSet, Split, annotation_path, choose_sets, split_from_path
from m2f.cluster.own_data.yolo import detect_yolo
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.folders import walk_folders
from m2f.data_pipeline.image_file import BrokenImageError, is_hidden_copy, read_header
from m2f.data_pipeline.readers.exports.cvat import listed_names
from m2f.data_pipeline.readers.exports.labelme import is_labelme
from m2f.data_pipeline.readers.exports.xml_file import read_xml
from m2f.data_pipeline.readers.files import files_below, read_json, stored_name
from m2f.data_pipeline.sources import (
    CocoInstancesSource,
    CocoPanopticSource,
    CvatSource,
    LabelmeSource,
    VocSource,
)
from m2f.model.errors import ConfigError

_NUM_LOOKED_UP = 20
"""Number of images that are looked up in each folder. More would make the search slow in large trees of folders."""
_VOC_LEGENDS = ("labelmap.txt", "class_names.txt")
"""Legends of the VOC format: the first is written by CVAT and datumaro, the second by labelme's conversion."""
_LABELME_MAPS = ("SegmentationClassPNG", "SegmentationObjectPNG")
"""Folders of maps that labelme's conversion writes if SegmentationClass holds arrays (.npy)."""


@dataclass(frozen=True)
class _JsonFile:
    path: Path
    content: Any


def find_formats(folder: Path) -> list[DataFormat]:
    """Return all formats that fit the folder. Folders of maps are considered only if no other format fits.

    Raises ConfigError if a format is damaged, or the folder is a public data set that has a reader of its own.
    """
    detected = [
        detect_yolo(folder),
        *_detect_json_formats(folder),
        _detect_cvat(folder),
        _detect_voc(folder),
    ]
    formats = [data_format for data_format in detected if data_format is not None]
    if not formats and (hint := describe_public_data(folder)):
        raise ConfigError(f"{folder} {hint}")
    return formats or find_map_formats(folder)


def choose_format(folder: Path, requested: str | None) -> DataFormat:
    """Return the requested format, or the only one that fits.

    Raises ConfigError if no format or several formats fit, or if the requested format does not fit. The message lists
    the formats that fit and the option that selects one. Also raises it if a used folder contains an unused set.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the folder of the unpacked export")
    formats = find_formats(folder)
    listed = "\n".join(f"  --format {data_format.kind}: {data_format.evidence}" for data_format in formats)
    chosen = [data_format for data_format in formats if requested in (None, data_format.kind)]
    if not formats:
        raise ConfigError(
            f"{folder} is not in a supported format: found no data.yaml with labels/, COCO or labelme JSON, CVAT XML, "
            "SegmentationClass/, or folders of images and maps with equal names."
            f"{describe_unsupported(folder)} docs/own_data.md lists the formats"
        )
    if not chosen:
        raise ConfigError(f"{folder} does not match --format {requested}; it matches:\n{listed}")
    if len(chosen) > 1:
        raise ConfigError(f"{folder} matches several formats; choose one:\n{listed}")
    _require_separate_sets(chosen[0])
    return chosen[0]


def _require_separate_sets(data_format: DataFormat) -> None:
    """Raise ConfigError if a used folder contains an unused set, because readers include all subfolders."""
    chosen = choose_sets(data_format)
    for outer in [Path(annotation_path(entry.source)) for entry in (*chosen.train, *chosen.val)]:
        for inner in [Path(annotation_path(entry.source)) for entry in chosen.unused]:
            if outer.is_dir() and inner.is_relative_to(outer):
                raise ConfigError(
                    f"{outer} contains the set {inner.relative_to(outer)}/, which is not used, but its files would be "
                    "read too. Move the other files into a subfolder train/, or move that set to another place"
                )


def _visible_files(folder: Path, ending: str) -> list[Path]:
    """Return the files in a folder whose names have an ending in any case, sorted, without hidden copies.

    The list is empty if the folder does not exist.
    """
    paths = (path for path in (folder.iterdir() if folder.is_dir() else ()) if path.name.lower().endswith(ending))
    return sorted(path for path in paths if path.is_file() and not is_hidden_copy(path.name))


def _detect_json_formats(folder: Path) -> list[DataFormat]:
    """Return the COCO and labelme formats. A folder with a labelme file is not searched further for COCO files."""
    coco: list[_JsonFile] = []
    labelme: list[Path] = []
    damaged: list[Path] = []
    by_folder: dict[Path, list[Path]] = {}
    for path in filter(Path.is_file, files_below(folder, ".json")):
        by_folder.setdefault(path.parent, []).append(path)
    for parent, paths in by_folder.items():
        for path in paths:
            try:
                content = parse_json(path.read_bytes())
            except DocumentError:
                damaged.append(path.relative_to(folder))
                continue
            if is_labelme(content):
                labelme.append(parent)
                break
            if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
                coco.append(_JsonFile(path, content))
    formats = []
    if coco:
        formats += _coco_formats(folder, coco)
    if labelme:
        formats.append(_labelme_format(folder, labelme))
    notes = (f"not used, because they are not valid JSON: {format_list(damaged)}",) if damaged else ()
    return [replace(data_format, notes=(*data_format.notes, *notes)) for data_format in formats]


def _coco_formats(folder: Path, files: Sequence[_JsonFile]) -> list[DataFormat]:
    sets: dict[str, list[SourceSet]] = {"coco_instances": [], "coco_panoptic": []}
    keypoints = [str(file.path.relative_to(folder)) for file in files if _has_keypoints(file)]
    notes: tuple[str, ...] = ()
    if 0 < len(keypoints) < len(files):
        files = [file for file in files if not _has_keypoints(file)]
        notes = (f"not used, because they annotate keypoints: {format_list(keypoints)}",)
    for file in files:
        if file.path.name.startswith("cityscapes_panoptic_"):
            continue  # names no files of images; another reader finds them (describe_public_data)
        split = _split_of(file.path, folder)
        entries = [e for e in file.content["annotations"] if isinstance(e, dict)]
        first = next(iter(entries), {})
        listed = [str(e.get("file_name")).replace("\\", "/") for e in file.content["images"] if isinstance(e, dict)]
        images = (
            _image_folder(folder, file.path, [(name,) for name in listed])
            or _image_folder(folder, file.path, [(PurePosixPath(name).name,) for name in listed])
            or file.path.parent
        )
        notes += _notes_about_images(folder, file.path, images)
        if "segments_info" in first:
            masks = next(
                (p for p in (file.path.with_suffix(""), folder / file.path.stem) if p.is_dir()), file.path.parent
            )
            source = CocoPanopticSource(images=str(images), panoptic_json=str(file.path), panoptic_masks=str(masks))
            sets["coco_panoptic"].append(SourceSet(split, source))
        else:
            source = CocoInstancesSource(
                images=str(images), instances_json=str(file.path), crowds_are_objects=any(map(_is_cvat_mask, entries))
            )
            sets["coco_instances"].append(SourceSet(split, source))
    return [
        DataFormat(kind, f"COCO annotations in {_listed_paths(folder, found)}", tuple(found), notes=notes)
        for kind, found in sets.items()
        if found
    ]


def _listed_paths(folder: Path, sets: Sequence[SourceSet]) -> str:
    """Return the annotation files of the first four sets, relative to the user's folder, as text."""
    return ", ".join(os.path.relpath(annotation_path(entry.source), folder) for entry in sets[:4])


def _has_keypoints(file: _JsonFile) -> bool:
    """Return whether a file annotates keypoints, such as person_keypoints_train2017.json.

    Such a file repeats the images of another file, so it is used only if there is no other.
    """
    return any(isinstance(entry, dict) and entry.get("keypoints") for entry in file.content["categories"])


def _is_cvat_mask(entry: dict[str, Any]) -> bool:
    """Return whether an annotation is a painted mask of CVAT, which marks all such masks as crowds.

    CVAT's exports contain `attributes`; COCO's own files do not.
    """
    is_crowd = entry.get("iscrowd") == 1 and isinstance(entry.get("segmentation"), dict)
    return is_crowd and isinstance(entry.get("attributes"), dict)


def _image_folder(folder: Path, annotations: Path, listed: Sequence[Sequence[str]]) -> Path | None:
    """Return the folder with the images that an annotation file lists; None if no folder has one of them.

    A folder whose name or split matches the file is preferred, even if it lacks some images, because exports repeat
    file names in different splits. Other folders need at least half as many images as the folder with the most.

    Args:
        folder: the user's folder, which is searched with all its subfolders.
        annotations: path of the annotation file.
        listed: possible names of each image. Only `_NUM_LOOKED_UP` evenly spaced images are looked up.
    """
    sample = listed[:: -(-len(listed) // _NUM_LOOKED_UP) or 1]
    nearby = (annotations.parent, annotations.parent / "images", folder, folder / "images")
    folders = list(dict.fromkeys((*nearby, *sorted(Path(parent) for parent, _ in walk_folders(str(folder))))))
    hits = {path: sum(stored_name(path, *names) is not None for names in sample) for path in folders}
    split, most_hits = _split_of(annotations, folder), max(hits.values())

    def order(path: Path) -> tuple[bool, bool, bool, bool, bool, int, int, int]:
        has_few, path_split = 2 * hits[path] < most_hits, _split_of(path, folder)
        is_named = annotations.stem.lower().endswith(f"_{path.name.lower()}")  # instances_Train.json and images/Train
        return (
            has_few and not is_named and (path_split is None or path_split != split),
            not is_named and path != annotations.parent,
            path_split != split,
            path_split != split and None not in (path_split, split),  # the folder of another split is the last choice
            has_few,
            min(folders.index(path), len(nearby)),
            -len(Path(os.path.commonpath((path, annotations))).parts),  # jobs of one tool repeat names of images
            -hits[path],
        )

    return min((path for path in folders if hits[path]), key=order, default=None)


def _split_of(path: Path, folder: Path) -> Split | None:
    """Return the split that a path names inside the user's folder."""
    return split_from_path(str(path.relative_to(folder)) if path.is_relative_to(folder) else "")


def _notes_about_images(folder: Path, annotations: Path, images: Path) -> tuple[str, ...]:
    """Return a message for the user if the images of an annotation file are in a folder of another split."""
    if None in (splits := {_split_of(annotations, folder), _split_of(images, folder)}) or len(splits) == 1:
        return ()
    names = [path.relative_to(folder) for path in (annotations, images)]
    return (f"{names[0]} is used with the images in {names[1]}, which names another split; check that they match",)


def _labelme_format(folder: Path, parents: Sequence[Path]) -> DataFormat:
    classes: set[str] = set()
    for parent in parents:
        for path in _visible_files(parent, ".json"):
            content = read_json(str(path))  # the reader refuses damaged files too
            if is_labelme(content):
                classes |= {str(shape.get("label")) for shape in content["shapes"] if isinstance(shape, dict)}
    names = tuple(sorted(name for name in classes if not name.startswith("_")))
    roots = {_split_folder(folder, parent): None for parent in parents}  # a dict removes duplicates and keeps the order
    splits = {root: split_from_path(str(root.relative_to(folder))) for root in roots}
    if not any(splits.values()):
        splits = {folder: None}
    sets = [
        SourceSet(split, LabelmeSource(images=str(folder), annotations=str(root), classes=names))
        for root, split in splits.items()
    ]
    return DataFormat("labelme", f"JSON files with `shapes` in {parents[0].name}/", tuple(sets))


def _split_folder(root: Path, folder: Path) -> Path:
    """Return the innermost folder from `folder` up to below `root` that is named after a split, or else `folder`."""
    below = (path for path in (folder, *folder.parents) if path != root and path.is_relative_to(root))
    return next((path for path in below if split_from_path(path.name)), folder)


def _detect_cvat(folder: Path) -> DataFormat | None:
    """Detect XML files of CVAT. The subsets of a project are sets if one of them is named after a split."""
    sets: list[SourceSet] = []
    notes: tuple[str, ...] = ()
    for path in filter(Path.is_file, files_below(folder, ".xml")):
        with path.open("rb") as stream:
            if b"<annotations" not in stream.read(1_000_000):
                continue
        try:
            elements = read_xml(str(path)).findall("image")
        except DataError:  # the reader reports it, if this format is chosen
            elements = []
        images = _image_folder(folder, path, [listed_names(element) for element in elements]) or path.parent
        source = CvatSource(images=str(images), annotations=str(path))
        subsets = {subset: split_from_path(subset) for subset in (e.get("subset", "") for e in elements)}
        if any(subsets.values()):
            sets += [SourceSet(split, replace(source, subset=subset)) for subset, split in subsets.items()]
        else:
            sets.append(SourceSet(_split_of(path, folder), source))
            notes += _notes_about_images(folder, path, images)
    return DataFormat("cvat", "an XML file with `<annotations>`", tuple(sets), notes=notes) if sets else None


def _detect_voc(folder: Path) -> DataFormat | None:
    """Detect Pascal VOC with grey or palette maps. RGB maps with a legend are a different format."""
    parents = sorted(Path(parent) for parent, _ in walk_folders(str(folder)))
    sources = {root: source for root in parents if (source := _voc_source(root)) is not None}
    if not sources or not all(_has_indexed_classes(Path(source.class_maps)) for source in sources.values()):
        return None
    require_equal_palettes([_visible_files(Path(source.class_maps), ".png") for source in sources.values()])
    sets = tuple(entry for root, source in sources.items() for entry in _voc_sets(folder, root, source))
    legend = next(iter(sources.values())).legend
    origin_of_classes = (
        f"with {Path(legend).name}"
        if legend
        else f"with the classes of Pascal VOC, because {_VOC_LEGENDS[0]} is missing"
    )
    return DataFormat("voc", f"folders SegmentationClass and SegmentationObject, {origin_of_classes}", sets)


def _has_indexed_classes(class_maps: Path) -> bool:
    try:
        mode = read_header(_visible_files(class_maps, ".png")[0].read_bytes()).mode
    except BrokenImageError:
        return False
    return mode in ("gray", "palette")


def _voc_source(root: Path) -> VocSource | None:
    """Return the source in a folder; None if the folder has no maps of classes and objects."""
    for classes, objects in (("SegmentationClass", "SegmentationObject"), _LABELME_MAPS):
        if (root / objects).is_dir() and _visible_files(root / classes, ".png"):
            return VocSource(
                images=f"{root}/JPEGImages",
                class_maps=f"{root}/{classes}",
                object_maps=f"{root}/{objects}",
                legend=next((str(root / name) for name in _VOC_LEGENDS if (root / name).is_file()), None),
            )
    return None


def _voc_sets(folder: Path, root: Path, source: VocSource) -> list[SourceSet]:
    """Return a set for each list of images, or one set with all class maps if the lists do not divide the images."""
    lists = {path: split_from_path(path.stem) for path in _visible_files(root / "ImageSets/Segmentation", ".txt")}
    if not {"train", "val"} & set(lists.values()):
        return [SourceSet(split_from_path(str(root.relative_to(folder))), source)]
    return [SourceSet(split, replace(source, image_set=str(path))) for path, split in lists.items()]
