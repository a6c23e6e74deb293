"""The recipes in a run folder: that of the first start, before any adjustment, and those of its checkpoints."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import describe_changes, dump_recipe, flatten, parse_recipe
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import RECIPE, list_checkpoints

STORED_RECIPE = "recipe.yaml"


def store_recipe(storage: Storage, config: RunConfig, has_progress: bool) -> tuple[str, ...]:
    """Store the resolved recipe in the run folder, or return a line for each setting that differs from the stored one.

    `has_progress` states whether the run has a checkpoint. If not, the stored recipe is overwritten.
    """
    url = join(config.run_folder, STORED_RECIPE)
    if not has_progress or not storage.exists(url):
        storage.put(url, dump_recipe(config).encode())
        return ()
    text = storage.get(url).decode()
    stored = _comparable(parse_recipe(text, source=url))
    now = _comparable(config)
    timeout = stored_setting(text, "training", "collective_timeout_s")
    if timeout is not None:  # as the first start had it, because `parse_recipe` raises that of earlier versions
        stored["training.collective_timeout_s"] = str(float(timeout))
    return describe_changes(stored, now, stored.keys() | now.keys())


def _comparable(config: RunConfig) -> dict[str, str]:
    """Return all settings as text, without the `test_time` of evaluation sets that equals `evaluation.test_time`.

    Earlier versions stored it for each set.
    """
    evaluation = config.evaluation
    sets = (replace(s, test_time=None) if s.test_time == evaluation.test_time else s for s in evaluation.sets)
    return flatten(replace(config, evaluation=replace(evaluation, sets=tuple(sets))))


def trained_recipe_url(storage: Storage, run_folder: str, step: int | None = None) -> str:
    """Return the path or URL of the recipe that the checkpoint of `step` was trained with.

    Without such a checkpoint, return that of the newest one, because a later start may have changed settings. If no
    checkpoint contains a recipe, return that of the first start.
    """
    checkpoints = sorted(list_checkpoints(storage, run_folder), key=lambda checkpoint: checkpoint.step != step)
    urls = (join(checkpoint.url, RECIPE) for checkpoint in checkpoints)
    return next((url for url in urls if storage.exists(url)), join(run_folder, STORED_RECIPE))


def stored_setting(content: str | bytes, *keys: str) -> Any:
    """Return a value of a stored recipe (YAML); None if it is missing or the recipe is damaged."""
    try:
        found: Any = parse_yaml(content)
        for key in keys:
            found = found[key]
    except (DocumentError, LookupError, TypeError):
        return None
    return found


def unused_name(config: RunConfig) -> str:
    """Return the run's name if its folder does not exist, otherwise the first free one of NAME-2, NAME-3, ..."""
    storage = Storage(config.storage)
    names = itertools.chain([config.name], (f"{config.name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not storage.list(replace(config, name=name).run_folder))
