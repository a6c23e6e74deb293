"""Find the images that the command line names (files, folders, patterns, `s3://` URLs) and prefetch them in threads."""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.folders import list_files
from m2f.data_pipeline.image_file import BrokenImageError, decode_rgb, frame_orientation, is_image_name, read_header
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.storage.storage import Storage

READ_AHEAD = 4
"""Maximum number of prefetched images, and number of threads that read them."""

_MAX_SHOWN = 300
"""Characters of a name in a message; longer texts are not paths, but for example images in base64."""


@dataclass(frozen=True)
class ImageInput:
    """An image to predict, with its names and id in the output."""

    url: str
    """Path or URL of the image file."""
    name: str
    """Stem of the output files: that of the image, with a number if several images share it."""
    id: int
    """Id from an image list, else the position, counted from 1."""
    size: tuple[int, int] | None = None
    """Height and width in pixels from an image list; None if there is no list."""


@dataclass(frozen=True)
class ImageList:
    """A COCO file that lists images without annotations, such as `image_info_test-dev2017.json`."""

    path: Path
    images: dict[str, tuple[int, int, int]]
    """Id, height and width of each image, by file name."""
    categories: dict[int, str]
    """Category names by id; empty if the file lists none."""


def find_images(words: Sequence[str], storage: Storage) -> tuple[str, ...]:
    """Return the paths and URLs that the words name, each once.

    A word is a file, a pattern, or a folder whose images are all included. Raises DataError if a word names no image.
    """
    found: list[str] = []
    for word in words:
        if not word.strip():
            raise DataError("an image name is empty; give a file, a folder or a pattern (is a shell variable not set?)")
        matches = _find_in_storage(word, storage) if "://" in word else _find_on_disk(word)
        if not matches:
            shown = word if len(word) <= _MAX_SHOWN else f"{word[:_MAX_SHOWN]}..."
            raise DataError(f"{shown}: no such image, or no JPEG, PNG, TIFF, BMP or WebP file in the folder")
        found += matches
    return tuple(dict.fromkeys(found))


def number_images(urls: Sequence[str]) -> tuple[ImageInput, ...]:
    """Return the images with ids from 1 and distinct names."""
    names = _distinct_names(urls)
    return tuple(ImageInput(url, name, i) for i, (url, name) in enumerate(zip(urls, names, strict=True), start=1))


def _distinct_names(urls: Sequence[str]) -> list[str]:
    """Return the stems of the files, with a number appended if several share one.

    Raises DataError if a stem is not allowed as a file name.
    """
    names: dict[str, None] = {}
    for url in urls:
        stem = check_key(PurePosixPath(url).stem, f"{url!a}")
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names[next(name for name in candidates if name not in names)] = None
    return list(names)


def read_image_list(path: Path) -> ImageList:
    """Read a COCO file with `images`. Raises DataError, which names the file, if it cannot be read."""
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        images = {e["file_name"]: (int(e["id"]), int(e["height"]), int(e["width"])) for e in document["images"]}
        categories = {int(e["id"]): str(e["name"]) for e in document.get("categories", ())}
    except OSError as error:
        raise DataError(f"{path}: the image list cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is not a COCO image list: `images` must have id, file_name, height and width ({error!r})"
        ) from error
    return ImageList(path, images, categories)


def match_image_list(urls: Sequence[str], image_list: ImageList) -> tuple[ImageInput, ...]:
    """Return the images that a list contains, in its order; other images are omitted.

    A base name suffices if it is unique in the list; otherwise the folders in the list must match too. Raises
    DataError if a listed image is missing or matches several files.
    """
    by_base: dict[str, list[str]] = {}
    for url in urls:
        by_base.setdefault(PurePosixPath(url).name, []).append(url)
    shared = Counter(PurePosixPath(name).name for name in image_list.images)
    found: dict[str, list[str]] = {}
    for name in image_list.images:
        base = PurePosixPath(name).name
        files = by_base.get(base, [])
        found[name] = [url for url in files if f"/{url}".endswith(f"/{name}")] or (files if shared[base] == 1 else [])
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(image_list.images)} images in {image_list.path} are not among the given images, "
            f"such as {missing[0]}; give the folder that contains them"
        )
    if ambiguous := next((name for name, files in found.items() if len(files) > 1), None):
        raise DataError(
            f"{image_list.path} lists {ambiguous}, which matches {found[ambiguous][0]} and {found[ambiguous][1]}; add "
            "the folder to the name in the list, or give only one of the files"
        )
    chosen = [files[0] for files in found.values()]
    return tuple(
        ImageInput(url, name, image_id, (height, width))
        for url, name, (image_id, height, width) in zip(
            chosen, _distinct_names(chosen), image_list.images.values(), strict=True
        )
    )


def read_images(
    inputs: Sequence[ImageInput], storage: Storage, max_pixels: int = DatasetConfig.max_pixels
) -> Iterator[tuple[ImageInput, np.ndarray | DataError]]:
    """Yield every image in order with its pixels [H, W, 3] uint8 RGB, or with a DataError if it cannot be read."""
    pending: deque[tuple[ImageInput, Future[np.ndarray | DataError]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="images") as pool:
        for image in inputs:
            pending.append((image, pool.submit(_read_or_error, image, storage, max_pixels)))
            if len(pending) > READ_AHEAD:
                first, pixels = pending.popleft()
                yield first, pixels.result()
        for first, pixels in pending:
            yield first, pixels.result()


def read_image(image: ImageInput, storage: Storage, max_pixels: int) -> np.ndarray:
    """Read the RGB pixels [H, W, 3] uint8 of an image.

    The pixels are oriented as a viewer shows them, or so that they match the size in the image list. Raises DataError,
    which names the image, if it cannot be read or has more than `max_pixels` pixels.
    """
    try:
        data = storage.get(image.url)
        header = read_header(data)
        if header.height * header.width > max_pixels:
            raise BrokenImageError(
                f"{header.width} x {header.height} pixels exceed the limit of {max_pixels}; shrink it"
            )
        orientation = header.orientation if image.size is None else frame_orientation(header, *image.size)
        return decode_rgb(data, orientation)
    except (StorageError, BrokenImageError) as error:
        raise DataError(f"{image.url}: the image cannot be read: {error}") from error


def _read_or_error(image: ImageInput, storage: Storage, max_pixels: int) -> np.ndarray | DataError:
    try:
        return read_image(image, storage, max_pixels)
    except DataError as error:
        return error


def _find_on_disk(word: str) -> list[str]:
    if os.path.isdir(word):  # in contrast to Path.is_dir, this returns False for a name that is too long
        return [str(inside) for inside in list_files(Path(word)) if is_image_name(str(inside))]
    if os.path.exists(word):
        return [word]
    return [match for match in sorted(glob.glob(word, recursive=True)) if is_image_name(match)]


def _find_in_storage(word: str, storage: Storage) -> list[str]:
    """Return the images below a URL that match. As on a disk, only `**` matches any number of folders."""
    if not glob.has_magic(word):
        inside = [url for url in storage.list(word) if is_image_name(url)]
        return inside or ([word] if storage.exists(word) else [])
    prefix = word[: next(i for i, letter in enumerate(word) if letter in "*?[")]
    urls = storage.list(prefix.rpartition("/")[0])
    return [url for url in urls if is_image_name(url) and _matches(url.split("/"), word.split("/"))]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the parts of a path match the parts of a pattern; `**` matches any number of parts."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
