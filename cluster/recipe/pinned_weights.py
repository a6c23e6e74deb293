"""Pin the commit of the Hugging Face model that a run starts from.

This module does not import torch, so that a missing network is reported quickly.
"""

from __future__ import annotations

from dataclasses import replace

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.stored import STORED_RECIPE, stored_setting
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.weights.hub import pin_revision
from m2f.model.weights.sources import HUB, HubAddress
from m2f.trainer.checkpoint.folder import list_checkpoints


def with_pinned_weights(config: RunConfig, storage: Storage) -> RunConfig:
    """Return the recipe with `model.weights: hub:...` pinned to a commit, so that all starts use the same weights.

    A run with checkpoints no longer needs the weights. It keeps the commit of its first start without contacting the
    hub. Raises WeightsError if the model does not exist or the hub cannot be reached.
    """
    weights = config.model.weights
    if weights is None or not weights.startswith(HUB):
        return config
    if list_checkpoints(storage, config.run_folder):
        stored = _stored_weights(config, storage)
        requested = HubAddress.parse(weights)
        if not stored.startswith(HUB) or requested.is_commit or HubAddress.parse(stored).repo != requested.repo:
            return config
        weights = stored
    else:
        weights = pin_revision(weights)
    return replace(config, model=replace(config.model, weights=weights))


def _stored_weights(config: RunConfig, storage: Storage) -> str:
    """Return `model.weights` of the recipe in the run folder; "" if there is none."""
    url = join(config.run_folder, STORED_RECIPE)
    if not storage.exists(url):
        return ""
    return str(stored_setting(storage.get(url), "model", "weights") or "")
