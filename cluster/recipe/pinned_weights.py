"""Which commit of the Hugging Face hub a run starts from. Imports no torch: without a network this is said at once."""

from __future__ import annotations

from dataclasses import replace

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.stored import STORED_RECIPE, stored_setting
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.weights.hub import pinned
from m2f.model.weights.sources import HUB, HubAddress
from m2f.trainer.checkpoint.folder import list_checkpoints


def with_pinned_weights(config: RunConfig, storage: Storage) -> RunConfig:
    """The run with the commit that `model.weights: hub:...` means, which all its starts then take.

    A run with checkpoints needs the weights no more: it keeps what it was started with, and asks nobody. Raises
    WeightsError where the hub has no such model or cannot be reached.
    """
    weights = config.model.weights
    if weights is None or not weights.startswith(HUB):
        return config
    if list_checkpoints(storage, config.run_folder):
        stored = _stored_weights(config, storage)
        asked = HubAddress.parse(weights)
        if not stored.startswith(HUB) or asked.is_commit or HubAddress.parse(stored).repo != asked.repo:
            return config
        weights = stored
    else:
        weights = pinned(weights)
    return replace(config, model=replace(config.model, weights=weights))


def _stored_weights(config: RunConfig, storage: Storage) -> str:
    """`model.weights` of the recipe in the run folder; empty where it has none."""
    url = join(config.run_folder, STORED_RECIPE)
    if not storage.exists(url):
        return ""
    return str(stored_setting(storage.get(url), "model", "weights") or "")
