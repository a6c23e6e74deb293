"""Steps of a run that is given in epochs."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_out
from m2f.data_pipeline.order.selection import select
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage


def with_steps(config: RunConfig, storage: Storage) -> RunConfig:
    """The run with `training.max_steps` in place of `training.max_epochs`, which one line says.

    Elastic runs keep their global batch, and so the number of images. Raises DataError, StorageError where a manifest
    is missing or no image is left.
    """
    training = config.training
    if not training.max_epochs:
        return config
    images = images_per_epoch(config, storage)
    steps = steps_of(training.max_epochs, images, training.global_batch)
    print_out(
        f"training.max_epochs {training.max_epochs:g}: {steps:,} steps of {training.global_batch} images, "
        f"{images:,.0f} images an epoch"
    )
    return replace(config, training=replace(training, max_steps=steps, max_epochs=0.0))


def images_per_epoch(config: RunConfig, storage: Storage) -> float:
    """Images of all data sets in `data.train`, as filters, limits and repeats leave them."""
    total = 0.0
    for number, item in enumerate(config.data.train):
        manifest = Manifest.load(config.datasets[item.dataset].shards, storage)
        total += select(manifest, item, config.data, config.seed, number).per_epoch
    return total


def steps_of(epochs: float, images: float, global_batch: int) -> int:
    """Steps that pass so often over so many images; the last one may begin another pass."""
    return max(1, math.ceil(Fraction(str(epochs)) * Fraction(images) / global_batch))
