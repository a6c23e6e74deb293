"""Common reader of data sets with one or two maps per image whose pixel values identify segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol, Self

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import (
    IMAGE_ENDINGS,
    BrokenImageError,
    decode_id_map,
    decode_index_map,
    read_header,
)
from m2f.data_pipeline.readers.files import (
    ANNOTATION_BYTES,
    files_below,
    load_image,
    read_bytes,
    require_size,
    size_on_disk,
    unique_keys,
)
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sample import Annotation, Sample

OTHER_MAP_ENDINGS = (".tif", ".tiff", ".bmp")
"""File name endings of lossless maps other than `.png`; case is ignored."""
LOSSY_ENDINGS = (".jpg", ".jpeg", ".webp")
"""File name endings of formats that change the values of maps; case is ignored."""


class MapDecoder(Protocol):
    """Decoder of the maps of a data set. It is picklable."""

    def decode(self, maps: Sequence[Path], max_pixels: int) -> Annotation:
        """Return the ground truth of one image from its map files. Raises DataError with the file and the problem."""
        ...


@dataclass(frozen=True, slots=True)
class MapRecord:
    """The files of one image."""

    index: int
    """Position in the whole data set, which is the image id."""
    key: str
    image: str
    """Path of the image relative to the folder of images."""
    maps: tuple[Path, ...]


@dataclass(frozen=True)
class MapReader:
    """Reader of images with map files. The decoder converts the maps into segments."""

    images: Path
    categories: CategoryTable
    decoder: MapDecoder
    records: tuple[MapRecord, ...]
    max_pixels: int
    unusable: tuple[UnusableAnnotation, ...] = ()
    """Maps without an image."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys in the order of `records`."""
        return tuple(record.key for record in self.records)

    def source(self, index: int) -> str:
        """Return the image's location for messages, as `folder/file name`."""
        return f"{self.images.name}/{self.records[index].image}"

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the files of the image and of its maps."""
        record = self.records[index]
        return self.images / record.image, *record.maps

    def read(self, index: int) -> Sample:
        """Read one image with its segments. Raises DataError if the image or a map is unusable."""
        record = self.records[index]
        try:
            annotation = self.decoder.decode(record.maps, self.max_pixels)
        except DataError as error:
            if missing := next((path for path in record.maps if not path.is_file()), None):
                raise DataError(f"{self.images / record.image}: it has no map ({missing})") from error
            raise
        assert annotation.seg is not None
        height, width = annotation.seg.shape
        file = load_image(self.images / record.image, height, width, self.max_pixels)
        return Sample(
            key=record.key,
            image_id=record.index,
            source=self.source(index),
            image=file.data,
            image_ext=file.ext,
            height=height,
            width=width,
            annotation=annotation,
            repairs=file.repairs,
        )

    def size_hint(self, index: int) -> int:
        """Return the size of the image file plus an estimate for the map, in bytes."""
        return size_on_disk(self.images / self.records[index].image) + ANNOTATION_BYTES

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a reader of the given images, in the given order."""
        return replace(self, records=tuple(self.records[i] for i in indices), unusable=())


def read_index_map(path: Path, max_pixels: int) -> np.ndarray:
    """Return the values [H, W] uint8 or uint16 of a grey or palette map. Raises DataError if it is unusable."""
    data = read_bytes(path)
    try:
        require_size(read_header(data), max_pixels)
        return decode_index_map(data)
    except BrokenImageError as error:
        raise DataError(f"{path}: {error}") from error


def read_color_map(path: Path, max_pixels: int) -> np.ndarray:
    """Return the values R + 256 G + 65536 B, [H, W] uint32, of a colour map. Raises DataError if it is unusable."""
    data = read_bytes(path)
    try:
        header = read_header(data)
        require_size(header, max_pixels)
        if header.mode.startswith("gray") or header.bit_depth > 8:
            raise BrokenImageError(
                f"this map must store ids in three 8-bit channels, but it is {header.bit_depth}-bit {header.mode}"
            )
        return decode_id_map(data)
    except BrokenImageError as error:
        raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class PairedFiles:
    """The images of a data set with their maps."""

    records: tuple[MapRecord, ...]
    """One record per image, in the order of stems. Maps that do not exist fail when the record is read."""
    unusable: tuple[UnusableAnnotation, ...]
    """Maps without an image."""


def pair_files(
    images: Path,
    *maps: Path,
    image_endings: tuple[str, ...] = IMAGE_ENDINGS,
    map_endings: tuple[str, ...] = (".png",),
    other_map_endings: tuple[str, ...] = (),
    base_names: bool = False,
) -> PairedFiles:
    """Pair all images with the files of the same stem in each folder of maps.

    A stem is the path relative to its folder without its ending.

    Args:
        images: folder of the images; subfolders are included.
        maps: folders of the maps, in the order that the decoder expects.
        image_endings: file name endings of images; case is ignored.
        map_endings: file name endings of maps; case is ignored.
        other_map_endings: endings of maps that are used if an image has no map with one of `map_endings`.
        base_names: make keys from stems without folders, for data sets in which these are unique.

    Raises:
        DataError: there is no image, no image has a map in one of the folders, or two files have the same stem or key.
    """
    map_suffixes = tuple(ending.lower() for ending in (*map_endings, *other_map_endings))
    if images in maps:  # the folder also holds the maps, for example `a.jpg` and `a.png`
        image_endings = tuple(ending for ending in image_endings if ending.lower() not in map_suffixes)
    image_names = _names_by_stem(images, image_endings)
    if images in maps:  # for example `a.png` and `a_mask.png`
        image_names = {stem: name for stem, name in image_names.items() if not name.lower().endswith(map_suffixes)}
    if not image_names:
        raise DataError(f"{images} contains no image ({', '.join(image_endings)}); the data set is empty")
    map_names: list[dict[str, str]] = []
    unusable: list[UnusableAnnotation] = []
    for folder in maps:
        names = _names_by_stem(folder, map_endings)
        if image_names.keys() - names.keys():
            names = _names_by_stem(folder, other_map_endings) | names
        if not image_names.keys() & names.keys():
            _refuse_unpaired(images, folder, image_names, names, image_endings, (*map_endings, *other_map_endings))
        if folder != images and image_names.keys() - names.keys():
            lossy = _names_by_stem(folder, LOSSY_ENDINGS)  # reading such a map states why it is refused
            names = {stem: name for stem, name in lossy.items() if stem in image_names} | names
        unpaired = sorted(names.keys() - image_names.keys())
        unusable += [
            UnusableAnnotation(str(folder / names[s]), f"its image {s}.* is not in {images}") for s in unpaired
        ]
        map_names.append({stem: names.get(stem, stem + map_endings[0]) for stem in image_names})
    stems = sorted(image_names)
    keys = unique_keys(f"{PurePosixPath(stem).name}.png" if base_names else image_names[stem] for stem in stems)
    records = tuple(
        MapRecord(i, key, image_names[stem], tuple(f / names[stem] for f, names in zip(maps, map_names, strict=True)))
        for i, (stem, key) in enumerate(zip(stems, keys, strict=True))
    )
    return PairedFiles(records, tuple(unusable))


def pair_files_with_suffixes(images: Path, maps: Path, image_suffix: str, map_suffix: str) -> PairedFiles:
    """Pair images with PNG, TIFF or BMP maps. Their stems end before the suffixes: see `LabelMapSource`.

    Raises DataError as `pair_files` does.
    """
    endings = tuple(map_suffix + ending for ending in (".png", *OTHER_MAP_ENDINGS))
    return pair_files(
        images,
        maps,
        image_endings=tuple(image_suffix + ending for ending in IMAGE_ENDINGS),
        map_endings=endings[:1],
        other_map_endings=endings[1:],
    )


def _refuse_unpaired(
    images: Path,
    folder: Path,
    image_names: Mapping[str, str],
    map_names: Mapping[str, str],
    image_endings: tuple[str, ...],
    map_endings: tuple[str, ...],
) -> None:
    """Raise DataError because no image has a map in `folder`."""
    if folder != images:
        _refuse_lossy(folder, set(image_names))
    unpaired = sorted(image_names.keys() | map_names.keys())
    raise DataError(
        f"{len(unpaired)} files in {images} ({', '.join(image_endings)}) and {folder} ({', '.join(map_endings)}) have "
        f"no counterpart with the same stem: {format_list(unpaired)}"
    )


def _refuse_lossy(folder: Path, stems: set[str]) -> None:
    """Raise DataError if maps with these stems exist in a lossy format, which changes values."""
    lossy = _names_by_stem(folder, LOSSY_ENDINGS)
    if names := sorted(lossy[stem] for stem in stems & lossy.keys()):
        raise DataError(
            f"{folder}: {len(names)} maps are JPEG or WebP files, which change values along the borders of segments: "
            f"{format_list(names)}; export them again as PNG, TIFF or BMP (a conversion keeps the wrong values)"
        )


def _names_by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Return the relative names of all files with one of the endings, by stem. Raises DataError for a repeated stem."""
    names: dict[str, str] = {}
    for path in files_below(folder, ""):
        name = path.relative_to(folder).as_posix()
        ending = next((ending for ending in endings if name.lower().endswith(ending.lower())), None)
        if ending is None:
            continue
        if (other := names.setdefault(name[: -len(ending)], name)) is not name:
            raise DataError(f"{folder}: {other} and {name} have the same stem; keep one of them")
    return names
