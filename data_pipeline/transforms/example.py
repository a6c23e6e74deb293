"""From a decoded sample to one augmented image with its targets."""

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
    """Settings that turn a decoded sample into an example."""

    task: Task
    labels: Mapping[int, int]
    """Source category id -> class."""
    augment: AugmentConfig
    drop_empty_targets: bool
    seed: int
    things: frozenset[int] = frozenset()
    """Classes whose targets copy-paste moves to other images."""
    rasterise: Rasterise = "source"
    crop_padding: CropPadding = "mean"

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width of every example; None where they differ."""
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
    position: int
    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    targets: ImageTargets
    size: tuple[int, int]
    dropped: int
    """Targets left out because nothing of them is left to see."""


def make_example(sample: DecodedSample, dataset: int, position: int, transform: TrainTransform) -> Example:
    """Targets, augmentation and removal of empty targets; a pure function of sample, position and transform."""
    return without_empty_targets(augment_sample(sample, dataset, position, transform, Stream.AUGMENT), transform)


def augment_sample(
    sample: DecodedSample, dataset: int, position: int, transform: TrainTransform, stream: Stream
) -> Example:
    """The example with all targets, empty ones too. `stream` is AUGMENT for the base, PASTED for the partner."""
    targets = image_targets(sample, transform.task, transform.labels)
    params = draw_params(sample_rng(transform.seed, position, stream), sample.size, transform.augment)
    augmented = augment(sample.image, targets.id_maps, params, targets.ignore)
    targets = replace(targets, id_maps=augmented.id_maps)
    if transform.rasterise == "crop" and (polygons := target_polygons(sample, transform.task)) is not None:
        targets = redraw_polygons(targets, polygons, sample.size, params, augmented.size)
    # What lies beyond this size is 0 after normalisation.
    size = augmented.size if transform.crop_padding == "mean" else params.canvas
    return Example(sample.key, dataset, position, augmented.image, targets, size, dropped=0)


def paste_objects(example: Example, partner: Example, transform: TrainTransform) -> Example:
    """Objects of `partner`, which has the same canvas, on top of `example`; what they hide wholly is dropped."""
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
    """Without the targets that the crop left without a pixel, where the transform says so."""
    if not transform.drop_empty_targets:
        return example
    targets, dropped = drop_empty_targets(example.targets, example.size)
    return replace(example, targets=targets, dropped=example.dropped + dropped)
