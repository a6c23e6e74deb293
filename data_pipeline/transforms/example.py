"""Convert a decoded sample into an augmented image with targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import cv2
import numpy as np

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import (
    AugmentConfig,
    CropPadding,
    LargeScaleJitter,
    Rasterise,
    ScaleJitter,
    ShortestEdgeCrop,
)
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.transforms.augment import augment, draw_params
from m2f.data_pipeline.transforms.copy_paste import draw_objects, paste
from m2f.data_pipeline.transforms.polygons import redraw_polygons
from m2f.data_pipeline.transforms.targets import ImageTargets, drop_empty_targets, image_targets, target_polygons


@dataclass(frozen=True)
class TrainTransform:
    """Settings for converting decoded samples of one data set into examples."""

    task: Task
    labels: Mapping[int, int]
    """Contiguous class by source category id."""
    augment: AugmentConfig
    drop_empty_targets: bool
    seed: int
    things: frozenset[int] = frozenset()
    """Classes whose targets copy-paste may paste."""
    rasterise: Rasterise = "source"
    crop_padding: CropPadding = "mean"

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Return the height and width of all examples; None if they differ."""
        match self.augment:
            case LargeScaleJitter(size=size):
                return size, size
            case ShortestEdgeCrop(crop=crop):
                return crop
            case ScaleJitter():
                return None
            case _:
                assert_never(self.augment)


@dataclass(frozen=True)
class Example:
    """One augmented image with its targets."""

    key: str
    dataset: int
    """Index of the data set in the mixture."""
    position: int
    """Position in the order."""
    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    targets: ImageTargets
    size: tuple[int, int]
    """Height and width of the part outside which pixels are 0 after normalisation; see `Batch.sizes`."""
    dropped: int
    """Number of targets removed because no pixel of them is visible."""


def make_example(sample: DecodedSample, dataset: int, position: int, transform: TrainTransform) -> Example:
    """Return the augmented example of a sample, without pasted objects.

    A pure function of sample, data set, position and transform.
    """
    return without_empty_targets(augment_sample(sample, dataset, position, transform, Stream.AUGMENT), transform)


def augment_sample(
    sample: DecodedSample, dataset: int, position: int, transform: TrainTransform, stream: Stream
) -> Example:
    """Return the augmented example with all targets, including empty ones.

    `stream` is AUGMENT for the base image and PASTED for the partner of copy-paste.
    """
    targets = image_targets(sample, transform.task, transform.labels)
    params = draw_params(sample_rng(transform.seed, position, stream), sample.size, transform.augment)
    augmented = augment(sample.image, targets.id_maps, params, targets.ignore)
    targets = replace(targets, id_maps=augmented.id_maps)
    if transform.rasterise == "crop" and (polygons := target_polygons(sample, transform.task)) is not None:
        targets = redraw_polygons(targets, polygons, sample.size, params, augmented.size)
    # Pixels beyond this size are 0 after normalisation.
    size = augmented.size if transform.crop_padding == "mean" else params.canvas
    return Example(sample.key, dataset, position, augmented.image, targets, size, dropped=0)


def paste_objects(example: Example, partner: Example, transform: TrainTransform) -> Example:
    """Return `example` with pasted objects of `partner`, which has the same canvas.

    Targets that are completely hidden are removed.
    """
    objects = draw_objects(partner.targets, transform.things, transform.seed, example.position)
    if not len(objects):
        return example
    pasted = paste(example.targets, partner.targets, objects, merge_classes=transform.task == "semantic")
    height, width = (np.flatnonzero(pasted.mask.any(axis=axis))[-1] + 1 for axis in (1, 0))
    image = cv2.copyTo(partner.image, pasted.mask.astype(np.uint8), example.image.copy())
    return replace(
        example,
        image=image,
        targets=pasted.targets,
        size=(max(example.size[0], int(height)), max(example.size[1], int(width))),
        dropped=example.dropped + pasted.hidden,
    )


def without_empty_targets(example: Example, transform: TrainTransform) -> Example:
    """Return the example without targets that have no pixel in it, if `drop_empty_targets` is set."""
    if not transform.drop_empty_targets:
        return example
    targets, dropped = drop_empty_targets(example.targets, example.size)
    return replace(example, targets=targets, dropped=example.dropped + dropped)
