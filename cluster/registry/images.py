"""Decode the images that clients send to a served model."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable

import numpy as np

from m2f.cluster.registry.fetch import MAX_BYTES, fetch_image, is_url
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.image_file import BrokenImageError, decode_rgb, read_header
from m2f.model.errors import UserError

_DATA_URL_PREFIX = "data:"
_CHANNELS = 3
"""Red, green and blue."""
_MAX_VALUE = 255
"""Largest value of an 8-bit channel."""


class ImageError(UserError):
    """A client sent something that is not an image, or an image that is too large."""


def flatten_images(column: Iterable[object]) -> list[object]:
    """Return the images of a column. MLflow's server turns a list of strings into one row; each string is an image."""
    found: list[object] = []
    for value in column:
        if isinstance(value, list | tuple | np.ndarray) and len(value) and _is_image(value[0]):
            found += list(value)
        else:
            found.append(value)
    return found


def _is_image(value: object) -> bool:
    return isinstance(value, str | bytes) or (isinstance(value, np.ndarray) and value.ndim == 3)


def read_pixels(value: object, allowed: Collection[str] = ()) -> np.ndarray:
    """Decode an image and return its RGB pixels [H, W, 3] uint8.

    Args:
        value: the bytes of a JPEG, PNG, WebP, TIFF or BMP file, or these as base64 text with or without a `data:` URL
            prefix. It may also be an http(s) URL, or an array or nested lists [H, W, 3] of RGB integers from 0 to 255.
        allowed: hosts from which URLs are downloaded.

    Raises:
        ImageError: the value is not an image, or the image is too large.
        FetchError: downloading a URL is not allowed, or failed.
    """
    if isinstance(value, str):
        data = fetch_image(value, allowed) if is_url(value) else _decode_base64(value)
        return _decode_file(data)
    if isinstance(value, bytes | bytearray | memoryview):
        return _decode_file(bytes(value))
    return _check_array(value)


def _decode_base64(text: str) -> bytes:
    if text.startswith(_DATA_URL_PREFIX):
        text = text.partition(",")[2]
    if len(text) > MAX_BYTES * 4 / 3 + 4:
        raise ImageError(f"the image is larger than {MAX_BYTES / 2**20:g} MiB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"the text is not a base64 image ({error}); send the bytes of an image file as base64, or the pixels as an "
            "array; file paths are not accepted"
        ) from error


def _decode_file(data: bytes) -> np.ndarray:
    if len(data) > MAX_BYTES:
        raise ImageError(f"the image is larger than {MAX_BYTES / 2**20:g} MiB")
    try:
        header = read_header(data)
        _check_size(header.height, header.width)
        return decode_rgb(data, header.orientation)
    except BrokenImageError as error:
        raise ImageError(f"the bytes are not a readable image: {error}") from error


def _check_array(value: object) -> np.ndarray:
    try:
        pixels = np.asarray(value)
        if pixels.dtype == object:  # an array of lists, as pandas creates it
            pixels = np.array(pixels.tolist())
    except ValueError as error:
        raise ImageError(f"the lists are not an image [H, W, 3]: {error}") from error
    if pixels.ndim != 3 or pixels.shape[-1] != _CHANNELS or 0 in pixels.shape:
        raise ImageError(
            f"the array has shape {list(pixels.shape)}; an image is RGB [H, W, 3], and `image` is a list of images"
        )
    _check_size(*pixels.shape[:2])
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.integer):
        raise ImageError(f"the array has dtype {pixels.dtype}; pixels must be integers from 0 to 255")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > _MAX_VALUE:
        raise ImageError(f"the array has values from {low} to {high}; pixels must be integers from 0 to 255")
    return pixels.astype(np.uint8)


def _check_size(height: int, width: int) -> None:
    limit = DatasetConfig.max_pixels
    if height * width > limit:
        raise ImageError(f"{width} x {height} pixels exceed the limit of {limit}; shrink the image")
