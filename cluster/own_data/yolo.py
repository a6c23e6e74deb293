"""Detect the YOLO format in a folder of user data."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from m2f.cluster.own_data.sets import DataFormat, SourceSet, Split
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.image_file import is_hidden_copy
from m2f.data_pipeline.readers.exports.yolo_seg import read_image_paths
from m2f.data_pipeline.sources import YoloSegSource
from m2f.model.errors import ConfigError

_SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "val"), ("valid", "val"), ("validation", "val"))
"""Names of splits in data.yaml. Ultralytics accepts `validation` too."""


def detect_yolo(folder: Path) -> DataFormat | None:
    """Return the format of a folder, or of all its subfolders with this format, as in unpacked archives.

    A folder has a data.yaml, or a classes.txt as in exports of Label Studio.

    Raises:
        ConfigError: data.yaml is damaged, names images that do not exist, or uses the same images for two splits.
            Ignoring such a split would silently replace it with a part of the training images.
    """
    if (found := _detect_in(folder)) is not None:
        return found
    inner = [path for path in sorted(folder.iterdir()) if os.access(path, os.R_OK | os.X_OK) and path.is_dir()]
    formats = [found for path in inner if (found := _detect_in(path)) is not None]
    if not formats:
        return None
    where = f", in {len(formats)} folders" if len(formats) > 1 else ""
    return DataFormat("yolo_seg", formats[0].evidence + where, tuple(entry for f in formats for entry in f.sets))


def _detect_in(folder: Path) -> DataFormat | None:
    paired = (folder / "images").is_dir() and (folder / "labels").is_dir()
    files = (path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())
    for path in sorted(path for path in files if not is_hidden_copy(path.name)):
        data = path.read_bytes()
        try:
            document = parse_yaml(data)
        except DocumentError as error:
            if re.search(rb"^(\xef\xbb\xbf)?[\"']?names[\"']?\s*:", data, re.MULTILINE):
                raise ConfigError(
                    f"{path} is not valid YAML: {error}. Correct it (UTF-8, spaces instead of tabs), or remove it"
                ) from error
            continue
        if not isinstance(document, dict) or "names" not in document:
            continue
        sets = _sets(folder, path, document) or (_undivided(folder, path) if paired else ())
        if sets:
            return DataFormat("yolo_seg", f"{path.name} lists classes and image folders", sets)
    path = folder / "classes.txt"
    if not (paired and path.is_file()):
        return None
    return DataFormat("yolo_seg", "classes.txt beside images/ and labels/", _undivided(folder, path))


def _undivided(folder: Path, classes: Path) -> tuple[SourceSet, ...]:
    source = YoloSegSource(images=f"{folder}/images", labels=f"{folder}/labels", data_yaml=str(classes))
    return (SourceSet(None, source),)


def _sets(folder: Path, data_yaml: Path, document: dict[str, Any]) -> tuple[SourceSet, ...]:
    sets = []
    for name, split in _SPLITS:
        values = document.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            path = _find_path(folder, document, str(value))
            images = path if path is None or path.is_dir() else _folder_of_listed_images(folder, path)
            if path is None or images is None:
                raise ConfigError(
                    f"{data_yaml}: {name} is {value!r}, which is neither a folder nor a text file that lists existing "
                    "images; correct the path, or remove it"
                )
            source = YoloSegSource(
                images=str(images),
                labels=str(_label_folder(images)),
                data_yaml=str(data_yaml),
                image_set=None if path == images else str(path),
            )
            if any(source == other.source and split != other.split for other in sets):
                raise ConfigError(
                    f"{data_yaml}: train and {name} are the same images, {value!r}. Remove {name} from the file: "
                    "m2f init then uses a part of the images for validation"
                )
            sets.append(SourceSet(split, source))
    return tuple(sets)


def _find_path(folder: Path, document: dict[str, Any], value: str) -> Path | None:
    """Return the folder or text file that a value of data.yaml names; None if it does not exist.

    Roboflow writes `../train/images` for a folder beside the file.
    """
    bare = re.sub(r"^(\.\./)+", "", value)
    candidates = (folder / str(document.get("path") or "") / value, folder / value, folder / bare)
    return next((p for p in candidates if p.is_dir() or (p.suffix == ".txt" and p.is_file())), None)


def _folder_of_listed_images(folder: Path, file: Path) -> Path | None:
    """Return the innermost folder with all images that a file lists; None if it lists no image of `folder`.

    The paths in the file may start with any further folders: CVAT writes `data/images/train/a.jpg`.
    """
    firsts = {path.parent: path for path in reversed(read_image_paths(str(file)))}
    found = [_find_image(folder, path) for path in firsts.values()]
    parents = [str(path.parent) for path in found if path is not None]
    return Path(os.path.commonpath(parents)) if parents and len(parents) == len(found) else None


def _find_image(folder: Path, path: PurePosixPath) -> Path | None:
    candidates = (folder.joinpath(*path.parts[i:]) for i in range(len(path.parts)))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _label_folder(images: Path) -> Path:
    """Return the folder of the text files: as in Ultralytics, the last folder `images` of the path becomes `labels`.

    If there is no such folder, the text files are beside the images.
    """
    labels = Path(re.sub(r"^(.*/)images(?=/|$)", r"\1labels", str(images)))
    return labels if labels.is_dir() else images
