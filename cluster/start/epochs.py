"""Compute the number of steps of a run whose length is given in epochs."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.stored import stored_setting
from m2f.cluster.start.continuation import newest_recipe
from m2f.cluster.terminal import print_out
from m2f.data_pipeline.order.selection import select
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError


def with_steps(config: RunConfig, storage: Storage) -> RunConfig:
    """Return the recipe with `training.max_epochs` replaced by `training.max_steps`, and print both.

    The number of steps also holds for elastic runs, because they keep their global batch. Raises DataError or
    StorageError if a manifest is missing or no image is left. Raises ConfigError if the run has checkpoints of another
    global batch.
    """
    training = config.training
    if not training.max_epochs:
        return config
    _require_same_batch(config, storage)
    images = images_per_epoch(config, storage)
    steps = count_steps(training.max_epochs, images, training.global_batch)
    print_out(
        f"training.max_epochs {training.max_epochs:g}: {steps:,} steps of {training.global_batch} images, "
        f"{images:,.0f} images per epoch"
    )
    return replace(config, training=replace(training, max_steps=steps, max_epochs=0.0))


def _require_same_batch(config: RunConfig, storage: Storage) -> None:
    """Raise ConfigError if the newest checkpoint has another batch: its step counter would not fit the new number."""
    recipe = newest_recipe(storage, config.run_folder)
    if recipe is None:
        return
    batch, steps = (stored_setting(recipe, "training", name) for name in ("global_batch", "max_steps"))
    if batch not in (None, config.training.global_batch):
        raise ConfigError(
            f"training.global_batch is {config.training.global_batch}, but the checkpoints of {config.run_folder} have "
            f"{batch}; the steps of training.max_epochs would change. Set training.global_batch to {batch}, or set "
            f"training.max_epochs to 0 and training.max_steps to a number of steps (until now {steps})"
        )


def images_per_epoch(config: RunConfig, storage: Storage) -> float:
    """Return the number of images per epoch of all data sets in `data.train`, after filters, limits and repeats."""
    total = 0.0
    for number, item in enumerate(config.data.train):
        manifest = Manifest.load(config.datasets[item.dataset].shards, storage)
        total += select(manifest, item, config.data, config.seed, number).per_epoch
    return total


def count_steps(epochs: float, images: float, global_batch: int) -> int:
    """Return the number of steps for `epochs` passes over `images` images, at least 1.

    The number is rounded up, so the last step may begin another pass.
    """
    return max(1, math.ceil(Fraction(str(epochs)) * Fraction(images) / global_batch))
