"""Images named on the command line: files, folders, patterns and `s3://` URLs, read ahead in threads."""

from __future__ import annotations

import glob
import itertools
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
from m2f.data_pipeline.image_file import BrokenImageError, decode_rgb, frame_orientation, is_image_name, read_header
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.storage.storage import Storage

READ_AHEAD = 4
"""Decoded images that wait, and threads that fetch them."""


@dataclass(frozen=True)
class ImageInput:
    """One image to predict."""

    url: str
    """Path or URL."""
    name: str
    """Of files that are made of it: the stem, with a number where several images share it."""
    id: int
    """From 1 in their order, or from an image list."""
    size: tuple[int, int] | None = None
    """Height and width, from an image list."""


@dataclass(frozen=True)
class ImageList:
    """A COCO file of images without annotations, as `image_info_test-dev2017.json`."""

    path: Path
    images: dict[str, tuple[int, int, int]]
    """Id, height and width by file name."""
    categories: dict[int, str]
    """Names by id; empty where the file lists none."""


def find_images(words: Sequence[str], storage: Storage) -> tuple[str, ...]:
    """Paths and URLs of the files themselves, of those that match a pattern, and of all images in folders, each once.

    Raises DataError for a word that names no image.
    """
    found: list[str] = []
    for word in words:
        inside = _in_bucket(word, storage) if "://" in word else _on_disk(word)
        if not inside:
            raise DataError(f"{word}: no such image, or no JPEG, PNG, TIFF, BMP or WebP file there")
        found += inside
    return tuple(dict.fromkeys(found))


def number_images(urls: Sequence[str]) -> tuple[ImageInput, ...]:
    """Images with ids from 1 and distinct names."""
    names = _distinct_names(urls)
    return tuple(ImageInput(url, name, i) for i, (url, name) in enumerate(zip(urls, names, strict=True), start=1))


def _distinct_names(urls: Sequence[str]) -> list[str]:
    """Stems, with a number where several files share one. Raises DataError for one that may not name a file."""
    names: dict[str, None] = {}
    for url in urls:
        stem = check_key(PurePosixPath(url).stem, f"{url!a}")
        wanted = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names[next(name for name in wanted if name not in names)] = None
    return list(names)


def read_image_list(path: Path) -> ImageList:
    """Read a COCO file with `images`. Raises DataError naming it."""
    try:
        document: dict[str, Any] = parse_json(path.read_bytes())
        images = {e["file_name"]: (int(e["id"]), int(e["height"]), int(e["width"])) for e in document["images"]}
        categories = {int(e["id"]): str(e["name"]) for e in document.get("categories", ())}
    except OSError as error:
        raise DataError(f"{path}: the image list cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: this is no COCO image list, with `images` of id, file_name, height and width ({error!r})"
        ) from error
    return ImageList(path, images, categories)


def listed_images(urls: Sequence[str], listed: ImageList) -> tuple[ImageInput, ...]:
    """The images of a list, in its order; others are left out.

    A base name is enough where it is the only one; else the folders in the list decide. Raises DataError for listed
    images that are missing, and for those that could be several files.
    """
    by_base: dict[str, list[str]] = {}
    for url in urls:
        by_base.setdefault(PurePosixPath(url).name, []).append(url)
    shared = Counter(PurePosixPath(name).name for name in listed.images)
    found: dict[str, list[str]] = {}
    for name in listed.images:
        base = PurePosixPath(name).name
        files = by_base.get(base, [])
        found[name] = [url for url in files if f"/{url}".endswith(f"/{name}")] or (files if shared[base] == 1 else [])
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise DataError(
            f"{listed.path} lists {len(missing)} of {len(listed.images)} images that are not among those given, "
            f"such as {missing[0]}; give the folder that holds them"
        )
    if several := next((name for name, files in found.items() if len(files) > 1), None):
        raise DataError(
            f"{listed.path} lists {several}, which could be {found[several][0]} or {found[several][1]}; write the "
            "folder into the list, or give only one of them"
        )
    chosen = [files[0] for files in found.values()]
    return tuple(
        ImageInput(url, name, image_id, (height, width))
        for url, name, (image_id, height, width) in zip(
            chosen, _distinct_names(chosen), listed.images.values(), strict=True
        )
    )


def read_images(
    inputs: Sequence[ImageInput], storage: Storage, max_pixels: int = DatasetConfig.max_pixels
) -> Iterator[tuple[ImageInput, np.ndarray | DataError]]:
    """Every image with its pixels [H, W, 3] uint8 RGB, or what is wrong with it, in order."""
    waiting: deque[tuple[ImageInput, Future[np.ndarray | DataError]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="images") as pool:
        for image in inputs:
            waiting.append((image, pool.submit(_read_or_error, image, storage, max_pixels)))
            if len(waiting) > READ_AHEAD:
                first, pixels = waiting.popleft()
                yield first, pixels.result()
        for first, pixels in waiting:
            yield first, pixels.result()


def read_image(image: ImageInput, storage: Storage, max_pixels: int) -> np.ndarray:
    """RGB pixels [H, W, 3] uint8 as a viewer shows them, or as the image list states. Raises DataError naming it."""
    try:
        data = storage.get(image.url)
        header = read_header(data)
        if header.height * header.width > max_pixels:
            raise BrokenImageError(f"{header.width} x {header.height} pixels are more than {max_pixels}; shrink it")
        orientation = header.orientation if image.size is None else frame_orientation(header, *image.size)
        return decode_rgb(data, orientation)
    except (StorageError, BrokenImageError) as error:
        raise DataError(f"{image.url}: the image cannot be read: {error}") from error


def _read_or_error(image: ImageInput, storage: Storage, max_pixels: int) -> np.ndarray | DataError:
    try:
        return read_image(image, storage, max_pixels)
    except DataError as error:
        return error


def _on_disk(word: str) -> list[str]:
    path = Path(word)
    if path.is_dir():
        return [str(inside) for inside in sorted(path.rglob("*")) if is_image_name(str(inside))]
    if path.exists():
        return [word]
    return [match for match in sorted(glob.glob(word, recursive=True)) if is_image_name(match)]


def _in_bucket(word: str, storage: Storage) -> list[str]:
    """`*` and `?` match within a folder, as on disk; `**` matches through folders."""
    if not glob.has_magic(word):
        inside = [url for url in storage.list(word) if is_image_name(url)]
        return inside or ([word] if storage.exists(word) else [])
    before = word[: next(i for i, letter in enumerate(word) if letter in "*?[")]
    urls = storage.list(before.rpartition("/")[0])
    deep = "**" in word
    return [u for u in urls if is_image_name(u) and fnmatchcase(u, word) and (deep or u.count("/") == word.count("/"))]
