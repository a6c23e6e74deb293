"""Say why a folder is in no supported format, and what its user can do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from m2f.cluster.own_data.pair_folders import is_map, is_named_like_maps
from m2f.data_pipeline.folders import walk_folders
from m2f.data_pipeline.image_file import is_hidden_copy
from m2f.model.format_count import format_count

_LOSSY_KINDS = (("JPEG", (".jpg", ".jpeg")), ("WebP", (".webp",)), ("GIF", (".gif",)))
"""Kinds of images that are not maps, with their endings."""
_OTHER_ENDINGS = (
    (("json", "ndjson", "jsonl", "csv"), "export COCO JSON from the tool that wrote them"),
    (("xml",), "if they contain only boxes, export polygons or masks"),
    (("parquet", "arrow", "npy", "npz", "mat", "h5"), "write their images and maps to PNG files"),
)
"""Endings of annotation files in other forms, with the remedy."""


_PUBLIC_DATA = (
    (
        r"_gtFine_labelIds\.png$",
        "is in the layout of Cityscapes: take a recipe of configs/cityscapes, whose kinds `cityscapes` and "
        "`cityscapes_panoptic` read leftImg8bit/ and gtFine/",
    ),
    (
        r"^(objectInfo150\.txt|ADE_(train|val|frame)_\d+_seg\.png)$",
        "is in a layout of ADE20K: take a recipe of configs/ade20k, and the kind `ade20k` for the files of the "
        "challenge or `ade20k_full` for the full release (docs/datasets.md)",
    ),
)
"""Patterns of file names in public data sets that have readers of their own, with the remedy."""
_OTHER_LAYOUTS = (
    (
        r"^task-\d+-annotation-\d+-by-",
        " It has masks that Label Studio exports as PNG or NumPy files, whose names do not name their images; export "
        "COCO instead.",
    ),
)
"""Patterns of file names in layouts that are not read, with the remedy as a sentence."""


def describe_unsupported(folder: Path) -> str:
    """Return what a folder contains instead of a supported format, as sentences; empty if that is unknown."""
    names = [(Path(parent).relative_to(folder), files) for parent, files in sorted(walk_folders(str(folder)))]
    layout = _known_layout(names, _OTHER_LAYOUTS)
    return layout or _inner_yolo(folder, names) or _unpaired_maps(names) or _other_files(names)


def describe_public_data(folder: Path) -> str:
    """Return a message that the folder is a public data set, and how to read it; empty if it is not."""
    names = [(Path(parent), files) for parent, files in walk_folders(str(folder))]
    return _known_layout(names, _PUBLIC_DATA)


_Folders = Sequence[tuple[PurePath, Sequence[str]]]


def _known_layout(folders: _Folders, layouts: Sequence[tuple[str, str]]) -> str:
    """Return the hint for the first layout whose pattern fits a file name; empty if none fits."""
    all_names = [name for _, names in folders for name in names]
    return next((hint for pattern, hint in layouts if any(re.search(pattern, name) for name in all_names)), "")


def _inner_yolo(folder: Path, folders: _Folders) -> str:
    """Return which folder is an export for YOLO, if it lies too deep to be detected; empty if there is none."""
    for path, files in folders:
        has_classes = any(name == "classes.txt" or name.lower().endswith((".yaml", ".yml")) for name in files)
        if has_classes and all((folder / path / name).is_dir() for name in ("images", "labels")):
            return f" {path}/ seems to be a YOLO export: give `m2f init` that folder."
    return ""


def _unpaired_maps(folders: _Folders) -> str:
    """Return why the first folder that is named like maps has no images; empty if there is none."""
    for path, files in folders:
        if not any(is_named_like_maps(Path(part)) for part in path.parts):
            continue
        if num_maps := sum(map(is_map, files)):
            listed = f" {path}/ has {format_count(num_maps, 'map')}"
            images = next((names for other, names in folders if other == path.parent / "images"), ())
            if len(images) == 1 < num_maps:
                return (
                    f"{listed} for the image in {path.parent}/images/: one map for each object is not read. Combine "
                    "them with the script in docs/own_data.md (masks to convert)."
                )
            return (
                f"{listed}, but no folder has images with their names; if the export lacks the images, copy them to "
                "images/, or give images and maps equal names."
            )
        for kind, endings in _LOSSY_KINDS:
            if count := sum(name.lower().endswith(endings) for name in files):
                reason = "GIF files are not read" if kind == "GIF" else f"{kind} changes values"
                listed = f" {path}/ has {format_count(count, f'{kind} file')}"
                return (
                    f"{listed}; if these are maps, export them as PNG, because {reason}. docs/own_data.md has a script "
                    "for masks of two values."
                )
    return ""


def _other_files(folders: _Folders) -> str:
    """Return which annotation files are in another form; empty if there are none."""
    found = [path / name for path, names in folders for name in names if not is_hidden_copy(name)]
    sentences = ""
    for endings, remedy in _OTHER_ENDINGS:
        files = [path for path in found if path.suffix.lower().removeprefix(".") in endings]
        if files:
            count = format_count(len(files), f"{files[0].suffix.lower()} file")
            sentences += f" It has {count} in another form, for example {files[0]}; {remedy}."
    return sentences
