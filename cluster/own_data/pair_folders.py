"""Find pairs of folders with images and maps whose file names match."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m2f.cluster.own_data.sets import Split, split_from_path
from m2f.data_pipeline.folders import walk_folders
from m2f.data_pipeline.image_file import BrokenImageError, is_image_name, read_header
from m2f.data_pipeline.readers.files import files_below
from m2f.data_pipeline.readers.map_reader import OTHER_MAP_ENDINGS

_SUFFIX = re.compile(r"[_. -](L|(?i:[^\W_]*(mask|label|annot|seg|gt|ground|target)[^\W_]*))$")
"""Name suffix of maps that are in the same folder as their images, for example `_mask`; `_L` is that of CamVid."""


@dataclass(frozen=True)
class Pair:
    """A folder of images and a folder of their maps."""

    root: Path
    """Folder in which both folders were found."""
    images: Path
    maps: Path
    image_suffix: str
    """Text between the stem and the extension of the images."""
    suffix: str
    """Text between the stem of the image and the extension of its map."""
    equal: tuple[Path, ...] = ()
    """Other folders that may have the images of these maps as well, because they are equally near."""

    @property
    def split(self) -> Split | None:
        """Split that the folder of the maps names, or else that of the images; None if they name none."""
        splits = (split_from_path(str(folder.relative_to(self.root))) for folder in (self.maps, self.images))
        return next(filter(None, splits), None)

    def map_files(self) -> list[Path]:
        """Return the paths of the maps, sorted. As in the readers, subfolders are included, and PNG has precedence."""
        found = [p for p in files_below(self.maps, "") if is_map(p.name) and p.stem.endswith(self.suffix)]
        found.sort(key=lambda path: path.suffix.lower() == ".png")
        return sorted({path.with_suffix(""): path for path in found}.values())


def is_map(name: str) -> bool:
    """Return whether a file name has the ending of a map."""
    return name.lower().endswith((".png", *OTHER_MAP_ENDINGS)) and is_image_name(name)


def find_pairs(folder: Path) -> tuple[list[Pair], list[Path]]:
    """Return pairs of folders in which at least 90 % of the maps are named after an image, and unpaired map folders.

    One folder may hold both images and maps. If several folders contain the images, because splits repeat names, the
    one nearest to the maps is used.
    """
    stems: dict[Path, dict[str, str]] = {}
    beside: list[Pair] = []
    for parent, files in sorted(walk_folders(str(folder))):
        images = [name for name in sorted(files) if is_image_name(os.path.join(parent, name))]
        found = {Path(name).stem: name for name in images}
        if _has_maps_with_equal_stems(Path(parent), images):
            beside.append(Pair(folder, Path(parent), Path(parent), "", ""))
        if found:
            stems[Path(parent)] = found
    like_maps = {path for path, names in stems.items() if _looks_like_maps(path.relative_to(folder), names)}
    images_below = {path: names for path, names in stems.items() if path not in like_maps}
    pairs, unpaired = [], []
    for maps, names in stems.items():
        if (suffixes := _suffixes_in_folder(names)) is not None:
            pairs.append(Pair(folder, maps, maps, *suffixes))
            continue
        if maps not in like_maps:
            continue
        if maps.name.startswith("SegmentationObject") and maps.with_name(maps.name.replace("Object", "Class")) in stems:
            continue  # the values of these maps are object numbers, not classes
        fitting = []
        for images, others in images_below.items() if all(map(is_map, names.values())) else ():
            if (suffixes := _name_suffixes(others, names)) is not None:
                fitting.append(Pair(folder, images, maps, *suffixes))
        if fitting:
            pairs.append(_nearest(fitting))
        else:
            unpaired.append(maps)
    if not pairs:
        matched = _find_nested_pairs(folder, stems) or _find_pairs_by_content(folder, stems) or beside
        return matched, [] if matched else unpaired
    return pairs, unpaired


def _has_maps_with_equal_stems(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has an image beside each map, such as `a.jpg` and `a.png`, which is grey or a palette."""
    maps = {Path(name).stem: folder / name for name in names if is_map(name)}
    others = {Path(name).stem for name in names if not is_map(name)}
    return bool(maps) and maps.keys() <= others and _has_one_channel(list(maps.values()))


def _find_pairs_by_content(folder: Path, stems: Mapping[Path, Mapping[str, str]]) -> list[Pair]:
    """Return pairs of folders with equal stems of which only one has grey or palette maps, whatever their names are."""
    maps = {path for path, names in stems.items() if _has_one_channel([path / name for name in names.values()])}
    pairs: list[Pair] = []
    for path in sorted(maps):
        names = stems[path].keys()
        fitting = [Pair(folder, p, path, "", "") for p in stems if p not in maps and names <= stems[p].keys()]
        pairs += [_nearest(fitting)] if fitting else []
    return pairs


def _has_one_channel(paths: Sequence[Path]) -> bool:
    """Return whether all files have the ending of a map, and the first 20 have one channel."""
    if not all(is_map(path.name) for path in paths):
        return False
    try:
        return all(read_header(path.read_bytes()).mode in ("gray", "palette") for path in paths[:20])
    except (OSError, BrokenImageError):
        return False


def _find_nested_pairs(folder: Path, stems: Mapping[Path, Mapping[str, str]]) -> list[Pair]:
    """Return pairs of folders whose images and maps are in subfolders of the same names, for example of patients.

    The outermost folder that is named like maps is paired, or its subfolders that are named after splits.
    """
    parts = {part for path in stems for part in path.relative_to(folder).parts}
    if not any(is_named_like_maps(Path(part)) for part in parts):
        return []  # joining all names is slow, and pointless if no folder is named like maps
    nested: dict[Path, dict[str, str]] = {}
    for parent, names in stems.items():
        for root in (path for path in (parent, *parent.parents) if path.is_relative_to(folder)):
            below = parent.relative_to(root)
            nested.setdefault(root, {}).update({(below / stem).as_posix(): name for stem, name in names.items()})
    pairs: list[Pair] = []
    for maps in sorted(nested):
        if not is_named_like_maps(maps.relative_to(folder)) or not all(map(is_map, nested[maps].values())):
            continue
        inside = (str(path.relative_to(maps)) for path in nested if path.is_relative_to(maps))
        if any(maps.is_relative_to(pair.maps) for pair in pairs) or any(map(split_from_path, inside)):
            continue
        fitting = []
        for images, names in nested.items():
            if (suffixes := _name_suffixes(names, nested[maps])) is None:
                continue  # checked first, because comparing paths is slower
            differing = images.relative_to(os.path.commonpath((images, maps)))
            if images.is_relative_to(maps) or is_named_like_maps(images.relative_to(folder)):
                continue  # also labels/train, as images of the maps in labels/val
            if not any(is_named_like_maps(Path(part)) for part in differing.parts):
                fitting.append(Pair(folder, images, maps, *suffixes))
        pairs += [_nearest(fitting)] if fitting else []
    return pairs


def _nearest(fitting: Sequence[Pair]) -> Pair:
    """Return the pair whose images are nearest to the maps, the first one if several are."""
    best = max(fitting, key=_nearness)
    return replace(best, equal=tuple(p.images for p in fitting if p is not best and _nearness(p) == _nearness(best)))


def _nearness(pair: Pair) -> tuple[bool, bool, int, int]:
    """Return a key that ranks pairs: equal splits, images without a suffix, common path, common start of the paths."""
    images, maps = str(pair.images), str(pair.maps)
    return (
        split_from_path(images) == split_from_path(maps),
        not pair.image_suffix,
        len(os.path.commonpath((images, maps))),
        len(_common_start((images, maps))),  # train/ and trainannot/
    )


def _suffixes_in_folder(names: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name suffixes of images and maps if about half of the files in a folder are maps, else None."""
    found = Counter(match[0] for stem in names if (match := _SUFFIX.search(stem)))
    for suffix, count in sorted(found.items()):
        if 2 * count < 0.9 * len(names):
            continue
        maps = {stem for stem in names if stem.endswith(suffix) and is_map(names[stem])}
        others = names.keys() - maps
        for image_suffix in ("", *_common_suffixes(others)) if maps else ():
            partners = sum(stem.removesuffix(suffix) + image_suffix in others for stem in maps)
            if partners == len(maps) and 2 * partners >= 0.9 * len(names):
                return image_suffix, suffix
    return None


def _looks_like_maps(folder: Path, names: dict[str, str]) -> bool:
    """Return whether a folder or its first file is named like maps. Contents do not help: images may also be grey.

    The path of the folder is relative to the user's folder, whose own name, such as `segmentation`, says nothing.
    """
    return is_named_like_maps(folder) or next(iter(names)).endswith(("_mask", "_L"))


def is_named_like_maps(folder: Path) -> bool:
    """Return whether a folder is named like maps, or its parent if the folder is named after a split."""
    words = r"mask|label|annot|(?<![a-z])ann(?![a-z])|seg|gt|ground|stuff|map|target"  # ann_dir of mmsegmentation
    name = "/".join(folder.parts[-2:]) if split_from_path(folder.name) else folder.name
    return re.search(words, name.lower()) is not None


def _name_suffixes(images: Collection[str], maps: Collection[str]) -> tuple[str, str] | None:
    """Return the parts of the stems of images and maps after their common part, for example `_sat` and `_mask`.

    Returns None if fewer than 90 % of the maps belong to an image.
    """
    for image_suffix in ("", *_common_suffixes(images)):
        stems = {stem.removesuffix(image_suffix) for stem in images}
        if (suffix := _map_suffix(stems, maps)) is not None:
            return image_suffix, suffix
    return None


def _common_suffixes(stems: Collection[str]) -> list[str]:
    """Return the suffixes that all stems of images share, the shortest first.

    A suffix starts with a separator and a letter. Only `_0000`, the first channel of nnU-Net, may be a number: other
    numbers count images. A single stem has no suffix, because every part of it would be one.
    """
    if len(stems) < 2:
        return []
    common = _common_start([stem[::-1] for stem in stems])[::-1].rpartition("/")[2]
    starts = [match.start() for match in re.finditer(r"[_. -](?=[^\W\d_])|_0000$", common)]
    return [common[start:] for start in reversed(starts)]


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all other texts start like both
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _map_suffix(images: Collection[str], maps: Collection[str]) -> str | None:
    """Return the part of the maps' names after the stem of the image, or None if fewer than 90 % of the maps match."""
    first = next(iter(maps))
    for stem in sorted(images, key=len, reverse=True):
        if first.startswith(stem):
            suffix = first[len(stem) :]
            fitting = sum(name.endswith(suffix) and name.removesuffix(suffix) in images for name in maps)
            if fitting >= 0.9 * len(maps):
                return suffix
    return None
