"""From a decoded sample to one augmented image with its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import cv2
import numpy as np

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import AugmentConfig, LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.transforms.augment import augment, draw_params
from m2f.data_pipeline.transforms.copy_paste import draw_objects, paste
from m2f.data_pipeline.transforms.targets import ImageTargets, drop_empty, image_targets


@dataclass(frozen=True)
class TrainRecipe:
    """All that turns a decoded sample into an example."""

    task: Task
    labels: Mapping[int, int]
    """Source category id -> class."""
    augment: AugmentConfig
    drop_empty_targets: bool
    seed: int
    things: frozenset[int] = frozenset()
    """Classes whose targets copy-paste moves to other images."""

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


def make_example(sample: DecodedSample, dataset: int, position: int, recipe: TrainRecipe) -> Example:
    """Targets, augmentation and removal of empty targets; a pure function of sample, position and recipe."""
    return without_empty(cut_example(sample, dataset, position, recipe, Stream.AUGMENT), recipe)


def cut_example(sample: DecodedSample, dataset: int, position: int, recipe: TrainRecipe, stream: Stream) -> Example:
    """The same with all targets: AUGMENT draws the image's geometry, PASTED that of an image it takes objects from."""
    targets = image_targets(sample, recipe.task, recipe.labels)
    params = draw_params(sample_rng(recipe.seed, position, stream), sample.size, recipe.augment)
    augmented = augment(sample.image, targets.id_maps, params, targets.ignore)
    targets = replace(targets, id_maps=augmented.id_maps)
    return Example(sample.key, dataset, position, augmented.image, targets, augmented.size, dropped=0)


def paste_objects(example: Example, partner: Example, recipe: TrainRecipe) -> Example:
    """Objects of `partner`, which has the same canvas, on top of `example`; what they hide wholly is dropped."""
    objects = draw_objects(partner.targets, recipe.things, recipe.seed, example.position)
    if not len(objects):
        return example
    pasted = paste(example.targets, partner.targets, objects, merge_classes=recipe.task == "semantic")
    height, width = (np.flatnonzero(pasted.mask.any(axis=axis))[-1] + 1 for axis in (1, 0))
    image = cv2.copyTo(partner.image, pasted.mask.astype(np.uint8), example.image.copy())
    return replace(
        example,
        image=image,
        targets=pasted.targets,
        size=(max(example.size[0], int(height)), max(example.size[1], int(width))),
        dropped=example.dropped + pasted.hidden,
    )


def without_empty(example: Example, recipe: TrainRecipe) -> Example:
    """Without the targets that the crop left without a pixel, where the recipe wants that."""
    if not recipe.drop_empty_targets:
        return example
    targets, dropped = drop_empty(example.targets, example.size)
    return replace(example, targets=targets, dropped=example.dropped + dropped)
