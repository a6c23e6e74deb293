"""Peers of the data benchmark: a mapper in the style of Detectron2, written here, and streaming by `webdataset`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.synthetic_images import SyntheticImage
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.augment import AugmentParams


@dataclass(frozen=True)
class Mapped:
    """Output of the mapper for one image of n segments."""

    image: Tensor
    """[3, H, W] uint8"""
    labels: Tensor
    """[n] int64 category ids"""
    masks: Tensor
    """[n, H, W] bool, one mask per segment."""


Pixels = tuple[np.ndarray, np.ndarray]
"""Image and colour-coded ids, [H, W, 3] uint8 each."""


def decode(encoded: SyntheticImage) -> Pixels:
    """Decode image and colour-coded ids with Pillow."""
    with Image.open(io.BytesIO(encoded.jpeg)) as image, Image.open(io.BytesIO(encoded.id_png)) as ids:
        return np.asarray(image.convert("RGB")), np.asarray(ids.convert("RGB"))


def map_image(encoded: SyntheticImage, image: np.ndarray, colors: np.ndarray, params: AugmentParams) -> Mapped:
    """Flip, resize, and pad or crop the whole image and its ids, then extract one mask per segment."""
    image = _transform(image, params, Image.Resampling.BILINEAR, padding=128)
    colors = _transform(colors, params, Image.Resampling.NEAREST, padding=0)
    ids = segment_ids(colors)
    segments = encoded.annotation.segments
    masks = [torch.from_numpy(np.ascontiguousarray(ids == segment.source_id)) for segment in segments]
    return Mapped(
        image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        labels=torch.tensor([segment.category_id for segment in segments]),
        masks=torch.stack(masks),
    )


def segment_ids(colors: np.ndarray) -> np.ndarray:
    """Return ids [H, W] int32 of colours [H, W, 3]: R + 256 G + 65536 B."""
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue


def collate(mapped: Sequence[Mapped]) -> tuple[Tensor, list[Tensor]]:
    """Stack the images to [B, 3, H, W], and pad the masks of each image to [n, H, W]."""
    images = torch.stack([example.image for example in mapped])
    height, width = images.shape[-2:]
    padded = []
    for example in mapped:
        masks = torch.zeros((len(example.masks), height, width), dtype=torch.bool)
        masks[:, : example.masks.shape[1], : example.masks.shape[2]] = example.masks
        padded.append(masks)
    return images, padded


def stream(urls: Sequence[str], storage: Storage | None = None) -> Iterator[dict[str, bytes]]:
    """Yield the samples of these tars in order, as unmodified `webdataset` reads them.

    With `storage`, URLs that begin with `s3://` are read through our client.
    """
    if storage is not None:
        webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize: io.BytesIO(storage.get(url))
    yield from webdataset.WebDataset(list(urls), shardshuffle=False)


def _transform(array: np.ndarray, params: AugmentParams, method: Image.Resampling, padding: int) -> np.ndarray:
    if params.flip:
        array = np.ascontiguousarray(array[:, ::-1])
    height, width = params.scaled
    resized = np.asarray(Image.fromarray(array).resize((width, height), method))
    y, x = params.offset
    if params.flip:
        x = max(width - params.canvas[1], 0) - x
    crop = resized[y : y + params.canvas[0], x : x + params.canvas[1]]
    missing = [side - actual for side, actual in zip(params.canvas, crop.shape[:2], strict=True)]
    return np.pad(crop, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=padding)
