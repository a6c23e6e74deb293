"""The recipe in a run folder: what the run was started with, before any adjustment."""

from __future__ import annotations

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import describe_changes, dump_recipe, flatten, parse_recipe
from m2f.data_pipeline.storage.storage import Storage, join

STORED_RECIPE = "recipe.yaml"


def store_recipe(storage: Storage, config: RunConfig, has_progress: bool) -> tuple[str, ...]:
    """Write the resolved recipe into the run folder, once; returns a line for each setting that differs from it.

    `has_progress` says whether the run has a checkpoint: a run without one may still change its recipe.
    """
    url = join(config.run_folder, STORED_RECIPE)
    if not has_progress or not storage.exists(url):
        storage.put(url, dump_recipe(config).encode())
        return ()
    stored = flatten(parse_recipe(storage.get(url).decode(), source=url))
    now = flatten(config)
    return describe_changes(stored, now, stored.keys() | now.keys())
