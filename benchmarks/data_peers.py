"""What the data benchmark compares with, written here: a mapper in Detectron2's way, and streaming by `webdataset`."""

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
    """What such a mapper hands to the model for one image."""

    image: Tensor
    """[3, H, W] uint8"""
    labels: Tensor
    masks: Tensor
    """[n, H, W] bool, one mask per segment."""


Pixels = tuple[np.ndarray, np.ndarray]
"""Image and colour-coded ids, [H, W, 3] uint8 each."""


def decode(encoded: SyntheticImage) -> Pixels:
    """Image and colour-coded ids by Pillow."""
    with Image.open(io.BytesIO(encoded.jpeg)) as image, Image.open(io.BytesIO(encoded.id_png)) as ids:
        return np.asarray(image.convert("RGB")), np.asarray(ids.convert("RGB"))


def map_image(encoded: SyntheticImage, image: np.ndarray, colors: np.ndarray, params: AugmentParams) -> Mapped:
    """Flip, resize and pad or crop everything whole, then ids, then one mask per segment."""
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
    """[H, W] R + 256 G + 65536 B."""
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue


def collate(mapped: Sequence[Mapped]) -> tuple[Tensor, list[Tensor]]:
    """Images in one tensor, and the masks of every image padded to its size."""
    images = torch.stack([one.image for one in mapped])
    height, width = images.shape[-2:]
    padded = []
    for one in mapped:
        masks = torch.zeros((len(one.masks), height, width), dtype=torch.bool)
        masks[:, : one.masks.shape[1], : one.masks.shape[2]] = one.masks
        padded.append(masks)
    return images, padded


def stream(urls: Sequence[str], storage: Storage | None = None) -> Iterator[dict[str, bytes]]:
    """Samples of these tars, one tar after the other, as stock `webdataset` reads them; `s3://` through our client."""
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
    missing = [side - have for side, have in zip(params.canvas, crop.shape[:2], strict=True)]
    return np.pad(crop, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=padding)
