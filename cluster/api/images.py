"""Convert the images of Python programs to pixels: paths, URLs, PIL images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from m2f.cluster.predict.inputs import ImageInput, find_images, read_images
from m2f.cluster.predict.predict import LoadedImage
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError

Channels = Literal["rgb", "bgr"]
"""Order of the colour channels in arrays and tensors. OpenCV reads images as "bgr"."""

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor
"""One image. `Model.predict` describes the shapes and value ranges."""

_PIL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""PIL image modes with a defined value range, which `convert("RGB")` keeps."""
_PIL_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
"""PIL modes of 16-bit grey, whose values `convert("RGB")` would clip at 255."""


@dataclass(frozen=True, eq=False)
class GivenImage:
    """An image as the caller gave it, with its pixels if they are already in memory."""

    input: ImageInput
    pixels: np.ndarray | None
    """[H, W, 3] uint8 RGB; None for an image that is read from its URL."""


def is_single(images: ImageLike | Sequence[ImageLike]) -> bool:
    """Return whether this is one image, not a list, a folder or a pattern that may match several."""
    if isinstance(images, str | os.PathLike):
        return not os.path.isdir(images) and _looks_like_file(os.fspath(images))
    return isinstance(images, Image.Image | np.ndarray | torch.Tensor)


def given_images(
    images: ImageLike | Sequence[ImageLike], channels: Channels, storage: Storage
) -> tuple[GivenImage, ...]:
    """Return the images in order, with ids from 1. Folders and patterns are replaced by the files that they match.

    Raises:
        ConfigError: `channels` is neither "rgb" nor "bgr".
        DataError: something is not an image; the message names its position in the list or its path.
    """
    if channels not in get_args(Channels):
        raise ConfigError(f"channels is {channels!r}; it must be 'rgb' or 'bgr'")
    is_one = isinstance(images, str | os.PathLike | Image.Image | np.ndarray | torch.Tensor)
    if is_one or not isinstance(images, Iterable):  # `to_pixels` refuses the latter, such as None
        images = [images]
    given: list[GivenImage] = []
    for position, image in enumerate(images):
        if isinstance(image, str | os.PathLike):
            urls = find_images([os.fspath(image)], storage)
            given += [GivenImage(ImageInput(url, "", len(given) + i), None) for i, url in enumerate(urls, start=1)]
        else:
            where = f"image {position}"
            given.append(GivenImage(ImageInput(where, where, len(given) + 1), to_pixels(image, channels, where)))
    return tuple(given)


def loaded_images(given: Sequence[GivenImage], storage: Storage) -> Iterator[LoadedImage]:
    """Yield every image with its pixels, reading files ahead in threads.

    Raises DataError, which names the file, if a file cannot be used.
    """
    from_files = read_images([image.input for image in given if image.pixels is None], storage)
    for image in given:
        if image.pixels is not None:
            yield LoadedImage(image.input, image.pixels)
            continue
        found, pixels = next(from_files)
        if isinstance(pixels, DataError):
            raise pixels
        yield LoadedImage(found, pixels)


def to_pixels(image: Image.Image | np.ndarray | torch.Tensor, channels: Channels, where: str) -> np.ndarray:
    """Return a copy of the pixels as [H, W, 3] uint8 RGB, because callers may write to their image afterwards.

    Raises DataError for an unsupported type, shape or value range. The message starts with `where` and states what was
    found and what is required.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, where)
    if isinstance(image, torch.Tensor):
        pixels = _from_tensor(image, where)
    elif isinstance(image, np.ndarray):
        pixels = _from_array(image, where)
    else:
        reason = " (OpenCV's imread returns it for a file that it cannot read)" if image is None else ""
        raise DataError(
            f"{where} is a {type(image).__name__}{reason}; give a path, a PIL image, an array [H, W, 3] uint8 or a "
            "tensor [3, H, W]"
        )
    if 0 in pixels.shape:
        raise DataError(f"{where} has no pixels: its shape is {tuple(image.shape)}")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    elif channels == "bgr":
        pixels = pixels[..., ::-1]
    return np.array(pixels, order="C")


def _from_pil(image: Image.Image, where: str) -> np.ndarray:
    if image.mode not in (*_PIL_MODES, *_PIL_GREY_16):
        remedy = "scale it to 8 bits yourself, because convert() clips" if image.mode in "IF" else "convert it to RGB"
        raise DataError(f"{where} is a PIL image of mode {image.mode}, which has no defined value range; {remedy}")
    if 0 in image.size:
        raise DataError(f"{where} has no pixels: its size is {image.width} x {image.height}")
    try:
        upright = ImageOps.exif_transpose(image)
        if image.mode in _PIL_GREY_16:  # as `decode_rgb` does for files
            return np.repeat((np.asarray(upright) // 256).astype(np.uint8)[..., None], 3, axis=-1)
        return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # PIL reads the pixels now; a broken PNG is a SyntaxError
        raise DataError(
            f"{where} is a PIL image whose pixels cannot be read ({error}); give an open image of a complete file"
        ) from error


def _from_array(image: np.ndarray, where: str) -> np.ndarray:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        several = "; for several images give list(images)" if image.ndim == 4 else ""
        raise DataError(
            f"{where} is an array {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3], 0 to 255, or grey "
            f"[H, W]{several}"
        )
    return image


def _from_tensor(image: torch.Tensor, where: str) -> np.ndarray:
    shape = list(image.shape)
    if image.ndim != 3 or shape[0] not in (1, 3) or not (image.dtype == torch.uint8 or image.is_floating_point()):
        several = "; for several images give list(images)" if image.ndim == 4 else ""
        raise DataError(
            f"{where} is a tensor {image.dtype} {shape}; it must be [3, H, W] or [1, H, W], uint8 from 0 to 255 or "
            f"floats from 0 to 1{several}"
        )
    image = image.detach().cpu()
    if image.is_floating_point() and image.numel():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # this form also rejects NaN
            raise DataError(
                f"{where} is a tensor of floats from {low:g} to {high:g}; give floats from 0 to 1 that are not "
                "normalised, or uint8 from 0 to 255"
            )
        image = (image * 255).round().to(torch.uint8)
    pixels = image.to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _looks_like_file(name: str) -> bool:
    """Return whether a name denotes a single file.

    A local path does so if it exists or is not a pattern. A URL does so if it has the suffix of an image and is not a
    pattern.
    """
    if "://" in name:
        from m2f.data_pipeline.image_file import is_image_name

        return is_image_name(name) and not any(letter in name for letter in "*?[")
    return os.path.exists(name) or not any(letter in name for letter in "*?[")
