"""Pin the weights that a run starts from: the commit of a Hugging Face model, or the checkpoint of another run.

This module does not import torch, so that a missing network is reported quickly.
"""

from __future__ import annotations

from dataclasses import replace

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.stored import STORED_RECIPE, stored_setting
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.weights.hub import pin_revision
from m2f.model.weights.sources import HUB, PACKAGE, HubAddress, is_file
from m2f.trainer.checkpoint.folder import list_checkpoints, newest_undamaged


def with_pinned_weights(config: RunConfig, storage: Storage) -> RunConfig:
    """Return the recipe with its start weights pinned, so that all starts use the same weights.

    In `model.weights` and `model.backbone.weights`, `hub:...` gets a commit, and the folder of a run is replaced by its
    newest checkpoint. A run with checkpoints no longer needs the weights. It keeps the values of its first start
    without contacting the hub. Raises WeightsError if the model does not exist or the hub cannot be reached.
    """
    model, backbone = config.model, config.model.backbone
    weights = _pinned(model.weights, ("model", "weights"), config, storage)
    backbone = replace(backbone, weights=_pinned(backbone.weights, ("model", "backbone", "weights"), config, storage))
    return replace(config, model=replace(model, weights=weights, backbone=backbone))


def _pinned(weights: str | None, path: tuple[str, ...], config: RunConfig, storage: Storage) -> str | None:
    """Return the pinned value of the setting at `path`."""
    if weights is None or weights.startswith(PACKAGE) or is_file(weights):
        return weights
    is_hub = weights.startswith(HUB)
    if list_checkpoints(storage, config.run_folder):
        stored = _stored_weights(config, path, storage)
        is_same = _is_commit_of(stored, weights) if is_hub else stored.startswith(f"{join(weights, 'checkpoints')}/")
        return stored if is_same else weights
    if is_hub:
        return pin_revision(weights, ".".join(path))
    newest = newest_undamaged(storage, weights)
    return weights if newest is None else newest.url


def _is_commit_of(stored: str, weights: str) -> bool:
    """Return whether a stored address is of the same model of the hub as one without a commit."""
    requested = HubAddress.parse(weights)
    return stored.startswith(HUB) and not requested.is_commit and HubAddress.parse(stored).repo == requested.repo


def _stored_weights(config: RunConfig, path: tuple[str, ...], storage: Storage) -> str:
    """Return the setting at `path` of the recipe in the run folder; "" if there is none."""
    url = join(config.run_folder, STORED_RECIPE)
    if not storage.exists(url):
        return ""
    return str(stored_setting(storage.get(url), *path) or "")
