"""Resolve `auto` settings before a run starts, from the available devices and the stored run."""

from __future__ import annotations

import os
from typing import get_args

from m2f.cluster.environment import usable_cores
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import AvailableDevices, StoredChoices, local_gpus, print_device_summary, settle
from m2f.cluster.recipe.stored import stored_setting
from m2f.cluster.start.backbone_start import settle_backbone
from m2f.cluster.start.continuation import newest_recipe
from m2f.cluster.terminal import print_err, print_out
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.backbones.published import has_frozen_norms, published_problem
from m2f.trainer.checkpoint.lease import LEASE_VARIABLE
from m2f.trainer.config import Precision
from m2f.trainer.engine.compile import find_compiler


def settled_run(config: RunConfig, devices: AvailableDevices, *, during_training: bool) -> RunConfig:
    """Return the recipe with `auto` resolved, and print the decisions; see `settle` and `settle_backbone`.

    A resumed run keeps its precision, and its choices of compilation and initial backbone weights. `during_training`
    states whether evaluations run during training.

    Raises ConfigError if the devices cannot run the recipe, or if the backbone requires published weights that are not
    available. Also raises it if a metric in `training` belongs to no set, or if the whole model is frozen.
    """
    config.check_metrics()
    config.model.require_trainable()
    stored = _stored_choices(config)
    config = print_device_summary(settle(config, devices, stored, during_training=during_training))
    start = settle_backbone(config, stored.pretrained, published_problem, has_frozen_norms)
    if start.line is not None:
        print_out(start.line)
    if start.warning is not None:
        print_err(f"warning: {start.warning}")
    return start.config


def local_devices() -> AvailableDevices:
    """Return the GPUs that torch sees, the usable cores, and whether there is a compiler for GPU kernels."""
    return AvailableDevices(local_gpus(), cores=usable_cores(), has_compiler=find_compiler("cuda") is not None)


def _stored_choices(config: RunConfig) -> StoredChoices:
    # With `m2f train --restart`, the parent process holds the lease, so the storage has already answered.
    storage = Storage(config.storage, known_reachable=LEASE_VARIABLE in os.environ, on_wait=print_err)
    recipe = newest_recipe(storage, config.run_folder)
    if recipe is None:
        return StoredChoices()
    precision = stored_setting(recipe, "training", "precision")
    compiles = stored_setting(recipe, "training", "compile")
    return StoredChoices(
        precision if precision in get_args(Precision) else None,
        compiles if isinstance(compiles, bool) else False,  # recipes without the setting were not compiled
        stored_setting(recipe, "model", "backbone", "pretrained") is True,
    )
