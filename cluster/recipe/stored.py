"""The recipe in a run folder: what the run was started with, before any adjustment."""

from __future__ import annotations

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe, flatten, parse_recipe
from m2f.data_pipeline.storage.storage import Storage, join

STORED_RECIPE = "recipe.yaml"
_ABSENT = "not set"


def store_recipe(storage: Storage, config: RunConfig, has_progress: bool) -> tuple[str, ...]:
    """Write the resolved recipe into the run folder, once; lines that say what differs from the one that is there.

    `has_progress` says whether the run has a checkpoint: a run without one may still change its recipe.
    """
    url = join(config.run_folder, STORED_RECIPE)
    if not has_progress or not storage.exists(url):
        storage.put(url, dump_recipe(config).encode())
        return ()
    stored = flatten(parse_recipe(storage.get(url).decode(), source=url))
    now = flatten(config)
    changed = [key for key in sorted(stored.keys() | now.keys()) if stored.get(key) != now.get(key)]
    return tuple(f"{key}: {stored.get(key, _ABSENT)} -> {now.get(key, _ABSENT)}" for key in changed)
