"""File functions of all readers: reading files, making keys from their names, and loading and checking images."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.folders import list_files
from m2f.data_pipeline.image_file import (
    BrokenImageError,
    ImageHeader,
    check_pixels,
    decode_rgb,
    encode_png,
    frame_orientation,
    is_hidden_copy,
    read_header,
)
from m2f.data_pipeline.keys import check_key, key_problem
from m2f.data_pipeline.readers.source_files import read_file

_MAX_KEY_LENGTH = 80  # with the longest suffix of a member, names in a tar stay below 100 characters
DARK_IMAGE = "images with 16 bits, but only values below 16384, stored almost black (rescale them to 8 bits)"
_MIN_MAXIMUM = 64
"""Smallest maximum, after the reduction to 8 bits, of images that are not `DARK_IMAGE`. Cameras with 10 to 14 bits stay
below it."""
ANNOTATION_BYTES = 12_000
"""Rough size in bytes of the members of a sample other than the image, for estimates."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A checked image file."""

    data: bytes
    ext: Literal["jpg", "png"]
    repairs: tuple[str, ...] = ()
    """Texts for Sample.repairs."""


def load_image(path: Path, height: int, width: int, max_pixels: int) -> LoadedImage:
    """Read an image file and check it as `check_image` does. Raises DataError that names the file if it is unusable."""
    return check_image(read_bytes(path), height, width, max_pixels, str(path))


def check_image(data: bytes, height: int, width: int, max_pixels: int, name: str) -> LoadedImage:
    """Check that the content of an image file decodes to `height` x `width`, and return it.

    JPEG and PNG files of at most 8 bits are unchanged. TIFF, BMP, WebP and 16-bit PNG files are decoded by `decode_rgb`
    and returned as 8-bit RGB PNG in the orientation of the annotation. Of 16 bits, only the upper 8 are kept.

    Raises:
        DataError: the image is damaged, has another size, is not supported or exceeds `max_pixels`. The message begins
            with `name`.
    """
    try:
        header = read_header(data)
        require_size(header, max_pixels)
        orientation = frame_orientation(header, height, width)
        if header.ext == "jpg" and header.bit_depth > 8:
            raise BrokenImageError(f"{header.bit_depth}-bit JPEG files are not supported; convert the image to 8 bits")
        if header.ext in ("jpg", "png") and header.bit_depth <= 8:
            check_pixels(data, header)
            return LoadedImage(data, header.ext)
        pixels = decode_rgb(data, orientation)
        is_dark = header.bit_depth == 16 and pixels.max() < _MIN_MAXIMUM
        return LoadedImage(encode_png(pixels), "png", (DARK_IMAGE,) if is_dark else ())
    except BrokenImageError as error:
        raise DataError(f"{name}: {error}") from error


def displayed_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image as viewers show it; zeros for a file that `read` will report."""
    try:
        header = read_header(path.read_bytes())
    except (OSError, BrokenImageError):
        return 0, 0
    return (header.height, header.width) if header.orientation < 5 else (header.width, header.height)


def require_size(header: ImageHeader, max_pixels: int) -> None:
    """Raise BrokenImageError if an image has more than `max_pixels` pixels."""
    if header.height * header.width > max_pixels:
        raise BrokenImageError(
            f"{header.width} x {header.height} pixels exceed max_pixels ({max_pixels}); shrink the image or "
            "raise datasets.<name>.max_pixels"
        )


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises DataError that names the file if it cannot be read."""
    try:
        return read_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; the annotations refer to it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: str) -> Any:
    """Return the content of a JSON file. Raises DataError naming the file if it is missing, unreadable or invalid."""
    require_file(path)
    try:
        return parse_json(read_bytes(Path(path)))
    except DocumentError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def require_file(path: str) -> None:
    """Raise DataError if a path is not an existing local file."""
    _require_local(path)
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist or is not a file; check the paths under datasets.<name>.source")


def require_folder(path: str) -> Path:
    """Return a folder as a Path. Raises DataError if it is not an existing local folder."""
    _require_local(path)
    if not Path(path).is_dir():
        raise DataError(f"{path} does not exist or is not a folder; check the paths under datasets.<name>.source")
    return Path(path)


def files_below(folder: Path, ending: str) -> list[Path]:
    """Return the files below a folder whose names have an ending, sorted, without hidden copies. Links are followed.

    The case of the ending is ignored.
    """
    found = (path for path in list_files(folder) if path.name.lower().endswith(ending.lower()))
    return [path for path in found if not is_hidden_copy(path.relative_to(folder).as_posix())]


def _require_local(path: str) -> None:
    if "://" in path:
        raise DataError(
            f"{path}: raw data must be in a local or mounted folder; copy or mount it, only shards can be in s3://"
        )


def relative_name(name: Any, where: str) -> str:
    """Return a file name from an annotation file, unchanged, after checking it. A leading `./` is allowed.

    Raises:
        DataError: the name is not a valid path inside its folder.
    """
    check_key(str(PurePosixPath(name)) if isinstance(name, str) and name else name, f"{where}: file_name")
    return name


def stored_name(folder: Path, *names: str) -> str | None:
    """Return the first name that a file in the folder has, in the spelling of the file system; None if there is none.

    macOS stores accented letters in two characters (NFD), annotation files usually in one (NFC). A name that leads out
    of the folder is never found.
    """
    for name in names:
        for spelled in dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))):
            is_inside = key_problem(str(PurePosixPath(spelled))) is None
            if is_inside and os.path.isfile(folder / spelled):  # False also for names that are too long
                return spelled
    return None


def make_key(file_name: str) -> str:
    """Return the sample key for a relative file name, made from the name without its extension.

    Keys have only ASCII letters, digits, `_` and `-`, because other characters confuse tar tools (webdataset splits
    names at the first dot). Other characters are replaced, and long names are cut. Such keys end with a digest, which
    keeps the keys of different names different.
    """
    stem = str(PurePosixPath(file_name).with_suffix(""))
    clean = re.sub(r"[^A-Za-z0-9_-]", "-", stem)
    if clean == stem and len(stem) <= _MAX_KEY_LENGTH:
        return stem
    return f"{clean[: _MAX_KEY_LENGTH - 9]}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"


def unique_keys(file_names: Iterable[str]) -> tuple[str, ...]:
    """Return the keys for file names. Raises DataError if two files would have the same key, or a name repeats."""
    first: dict[str, str] = {}
    for name in file_names:
        if (key := make_key(name)) in first:
            raise DataError(
                f"{first[key]} and {name} would have the same key {key!r}; rename one of them, or list it once"
            )
        first[key] = name
    return tuple(first)


def size_on_disk(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is missing, which is reported when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
