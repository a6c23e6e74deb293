"""Batches for training and evaluation, and their collation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from m2f.data_pipeline.config import Shrink
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.transforms.augment import PADDING_GREY, resize_image, shortest_edge_size
from m2f.data_pipeline.transforms.example import Example
from m2f.data_pipeline.transforms.targets import ImageTargets
from m2f.model.structures import BACKGROUND_ID, Targets, ignore_id

FILLER_POSITION = -1
"""Position of fillers, which have weight zero and no targets."""

EVAL_PADDING = (124, 116, 104)
"""ImageNet's mean colour, RGB. After normalisation the padding is near zero, as in the official test-time batches."""

SIZE_MULTIPLE = 32
"""Batches without a fixed size have a height and width that are multiples of this (Detectron2: size divisibility)."""

_BUCKET = 8  # the number of targets is padded to a multiple of this, to limit the number of different shapes


@dataclass(frozen=True)
class Batch:
    """One micro-batch of augmented images with their targets."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB in channels_last memory."""
    targets: Targets
    keys: tuple[str, ...]
    """Sample keys for messages and panels; empty for fillers."""
    sizes: Tensor
    """[B, 2] int64 height and width of the part that shows the image or pasted objects. The rest is padding, which is 0
    after normalisation. With `data.crop_padding: grey` the part is the whole crop."""
    dropped_targets: int
    """Number of targets removed because no pixel of them is visible."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on another device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in pinned host memory."""
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=self.targets.pin_memory(),
            sizes=self.sizes.pin_memory(),
        )


@dataclass(frozen=True)
class EvalBatch:
    """Resized images for the model, with the samples that they were made from."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB in channels_last memory, padded on the right and below with EVAL_PADDING."""
    sizes: Tensor
    """[B, 2] int64 height and width of the resized images inside the padding."""
    indices: tuple[int, ...]
    """Rows of the samples in the manifest."""
    samples: tuple[DecodedSample, ...]
    """Samples with image and ground truth at the original size."""


def collate(examples: Sequence[Example | None], canvas: tuple[int, int] | None) -> Batch:
    """Stack examples, padded on the right and below, into a batch.

    Args:
        examples: examples that fit into `canvas`. None becomes a grey filler of weight zero without targets;
            `show_image_in_fillers` gives it an image.
        canvas: height and width of the batch. None uses the smallest multiples of SIZE_MULTIPLE that hold all examples.
    """
    shapes = [example.image.shape[:2] for example in examples if example is not None]
    canvas = canvas or _smallest_canvas(shapes)
    padded = [_filler(canvas) if example is None else _pad_example(example, canvas) for example in examples]
    return Batch(
        images=_stack_images([example.image for example in padded]),
        targets=_stack_targets(padded),
        keys=tuple(example.key for example in padded),
        sizes=torch.tensor([example.size for example in padded], dtype=torch.int64),
        dropped_targets=sum(example.dropped for example in padded),
    )


def show_image_in_fillers(batches: Sequence[Batch]) -> None:
    """Give the fillers in the batches of a rank's step the pixels of its first image, as far as they fit, in place.

    Fillers do not affect losses, but trained BatchNorms count their pixels, and grey ones would distort the statistics.
    Without any image, fillers stay grey.
    """
    first = batches[0]
    if not first.targets.weight[0]:
        return
    for batch in batches:
        height, width = map(min, first.images.shape[2:], batch.images.shape[2:])
        for row in torch.nonzero(batch.targets.weight == 0).flatten().tolist():
            batch.images[row, :, :height, :width] = first.images[0, :, :height, :width]
            batch.sizes[row] = first.sizes[0].clamp(max=torch.tensor((height, width)))


def collate_eval(
    samples: Sequence[DecodedSample],
    indices: Sequence[int],
    shortest_edge: int,
    max_size: int,
    shrink: Shrink = "area",
    square: bool = False,
) -> EvalBatch:
    """Resize images by Detectron2's shortest-edge rule and pad them to one size, in multiples of SIZE_MULTIPLE.

    Args:
        samples: decoded samples.
        indices: their rows in the manifest.
        shortest_edge: length of the shorter side in pixels.
        max_size: upper limit of the longer side in pixels.
        shrink: interpolation, see `data.augment.shrink`.
        square: pad to a square.
    """
    sizes = [shortest_edge_size(sample.size, shortest_edge, max_size) for sample in samples]
    height, width = _smallest_canvas(sizes, square)
    images = np.empty((len(samples), height, width, 3), dtype=np.uint8)
    images[:] = EVAL_PADDING
    for image, sample, (h, w) in zip(images, samples, sizes, strict=True):
        image[:h, :w] = resize_image(sample.image, (h, w), shrink)
    return EvalBatch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        sizes=torch.tensor(sizes, dtype=torch.int64),
        indices=tuple(indices),
        samples=tuple(samples),
    )


def padded_eval_size(size: tuple[int, int], shortest_edge: int, max_size: int, square: bool = False) -> tuple[int, int]:
    """Return the padded height and width that `collate_eval` gives to a single image of `size` (height, width)."""
    return _smallest_canvas([shortest_edge_size(size, shortest_edge, max_size)], square)


def _smallest_canvas(sizes: Sequence[tuple[int, ...]], square: bool = False) -> tuple[int, int]:
    """Return the smallest height and width, multiples of SIZE_MULTIPLE, that hold all sizes (height, width)."""
    height, width = (-(-max(sides) // SIZE_MULTIPLE) * SIZE_MULTIPLE for sides in zip((1, 1), *sizes, strict=True))
    return (max(height, width),) * 2 if square else (height, width)


def _pad_example(example: Example, canvas: tuple[int, int]) -> Example:
    if example.image.shape[:2] == canvas:
        return example
    bottom, right = (side - current for side, current in zip(canvas, example.image.shape, strict=False))
    image = np.pad(example.image, ((0, bottom), (0, right), (0, 0)), constant_values=PADDING_GREY)
    targets = example.targets
    id_maps = np.pad(targets.id_maps, ((0, 0), (0, bottom), (0, right)), constant_values=targets.ignore)
    return replace(example, image=image, targets=replace(targets, id_maps=id_maps))


def _filler(canvas: tuple[int, int]) -> Example:
    empty = np.zeros(0, dtype=np.int64)
    targets = ImageTargets(np.full((1, *canvas), ignore_id(torch.uint8), dtype=np.uint8), empty, empty, empty)
    image = np.full((*canvas, 3), PADDING_GREY, dtype=np.uint8)
    return Example("", 0, FILLER_POSITION, image, targets, (0, 0), 0)


def _stack_images(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _stack_targets(examples: Sequence[Example]) -> Targets:
    max_targets = max(len(example.targets.labels) for example in examples)
    shape = (len(examples), max(1, -(-max_targets // _BUCKET)) * _BUCKET)
    labels, layer, local_id = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    valid = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        count = len(example.targets.labels)
        labels[row, :count] = torch.from_numpy(example.targets.labels)
        layer[row, :count] = torch.from_numpy(example.targets.layer)
        local_id[row, :count] = torch.from_numpy(example.targets.local_id)
        valid[row, :count] = True
    return Targets(
        id_maps=_stack_id_maps([example.targets for example in examples]),
        labels=labels,
        layer=layer,
        local_id=local_id,
        valid=valid,
        weight=torch.tensor([float(example.position != FILLER_POSITION) for example in examples]),
        dataset=torch.tensor([example.dataset for example in examples], dtype=torch.int64),
        position=torch.tensor([example.position for example in examples], dtype=torch.int64),
    )


def _stack_id_maps(targets: Sequence[ImageTargets]) -> Tensor:
    """Return [B, Y, H, W], int16 if any image needs it, else uint8. Images with fewer layers get empty ones."""
    dtype = np.result_type(*(t.id_maps.dtype for t in targets))
    layers = max(len(t.id_maps) for t in targets)
    stacked = np.full((len(targets), layers, *targets[0].id_maps.shape[1:]), BACKGROUND_ID, dtype=dtype)
    for row, t in zip(stacked, targets, strict=True):
        row[: len(t.id_maps)] = t.id_maps
        if t.id_maps.dtype != dtype:
            row[row == t.ignore] = ignore_id(torch.int16)
    return torch.from_numpy(stacked)
