"""Find the recipe that the first argument of a verb names, and the weights that `--checkpoint` names."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from m2f.cluster.evaluation.choice import best_step, default_metric
from m2f.cluster.evaluation.queue import queue_url, read_entries
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe, parse_recipe
from m2f.cluster.recipe.paths import with_absolute_paths
from m2f.cluster.recipe.stored import trained_recipe_url
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import MANIFEST, RECIPE, list_checkpoints


@dataclass(frozen=True)
class ChosenWeights:
    """Weights to use: a checkpoint of the run, or other weights."""

    url: str
    """Path or URL of a checkpoint folder or weight file."""
    step: int | None
    """Optimizer step; None if the weights are not a checkpoint of the run."""

    @property
    def name(self) -> str:
        """Name of the folder for results of these weights. Only checkpoints of the run get names like `step_00000042`.

        Other weights with such a name get the prefix `weights_`.
        """
        if self.step is not None:
            return f"step_{self.step:08d}"
        path = Path(os.path.abspath(self.url))  # only the last part is used, and abspath keeps that of a URL
        name = path.name if path.is_dir() else path.stem
        return f"weights_{name}" if name.startswith("step_") else name


def open_recipe(source: str, overrides: Sequence[str], step: int | None = None) -> tuple[RunConfig, str | None]:
    """Read the recipe of a YAML file, a run folder or a checkpoint folder, local or by URL.

    The recipe of a run is that of its checkpoint of `step`; None: the newest. Return the recipe, and the path or URL
    of the checkpoint folder; None if `source` is not one. Raises ConfigError if a folder is neither a run nor a
    checkpoint, for example a Hugging Face model, which has no recipe.
    """
    if _is_file(source):
        return load_recipe(source, overrides), None
    url = source if "://" in source else str(Path(source).resolve())
    storage, recipe = Storage(), join(url, RECIPE)
    if not storage.exists(recipe):
        if storage.exists(join(url, "config.json")):
            raise ConfigError(
                f"{source} is a Hugging Face model without data sets; give a recipe, and --checkpoint {source}"
            )
        raise ConfigError(f"{url} has neither a {RECIPE} (a run) nor a config.json (a Hugging Face model)")
    is_checkpoint = storage.exists(join(url, MANIFEST))
    if not is_checkpoint:
        recipe = trained_recipe_url(storage, url, step)
    config = with_absolute_paths(parse_recipe(storage.get(recipe).decode(), overrides, source=recipe))
    if is_checkpoint:
        return config, url
    parent, _, name = url.rstrip("/").rpartition("/")  # the run folder may have been moved or renamed
    return replace(config, output=parent, name=name), None


def recipe_of(weights: ChosenWeights, source: str, overrides: Sequence[str], config: RunConfig) -> RunConfig:
    """Return the recipe that the chosen checkpoint of a run was trained with.

    Return `config`, the recipe of `source`, if `source` is a YAML file or the weights are not the run's.
    """
    if weights.step is None or _is_file(source):
        return config
    return open_recipe(source, overrides, weights.step)[0]


def _is_file(source: str) -> bool:
    return "://" not in source and not os.path.isdir(source)


def choose_checkpoint(config: RunConfig, storage: Storage, requested: str | None) -> ChosenWeights:
    """Return the weights that `requested` names.

    None and `last` mean the newest checkpoint of the run, `best` means the best one, and a number means the checkpoint
    of that step. Anything else is a path or URL of weights.

    Raises:
        ConfigError: the run has no checkpoint, none of that step, or none that was evaluated; or a local path does not
            exist.
    """
    if requested is not None and not requested.isdecimal() and requested not in ("best", "last"):
        if "://" not in requested and not os.path.exists(requested):
            raise ConfigError(f"--checkpoint {requested}: no such file or folder")
        return ChosenWeights(requested, None)
    found = list_checkpoints(storage, config.run_folder)
    if not found:
        raise ConfigError(
            f"{config.run_folder} has no checkpoint; train first, or give a weight file with --checkpoint"
        )
    if requested in (None, "last"):
        return ChosenWeights(found[0].url, found[0].step)
    steps = {checkpoint.step for checkpoint in found}
    step = _best_step(config, storage, steps) if requested == "best" else int(requested)
    for checkpoint in found:
        if checkpoint.step == step:
            return ChosenWeights(checkpoint.url, checkpoint.step)
    available = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise ConfigError(f"{config.run_folder} has no checkpoint of step {step}; available steps: {available}")


def _best_step(config: RunConfig, storage: Storage, steps: Set[int]) -> int:
    """Return the one of `steps`, which have checkpoints, with the best value of `training.checkpoint.best_metric`.

    If the setting is None, the first headline metric of the newest evaluation is used. Raises ConfigError if no
    published evaluation of these steps has the metric.
    """
    published = [entry for entry in read_entries(storage, queue_url(config)) if entry.status == "published"]
    entries = [entry for entry in published if entry.step in steps]
    metric = config.training.checkpoint.best_metric or (default_metric(entries[-1].metrics) if entries else None)
    best = None if metric is None else best_step({entry.step: entry.metrics for entry in entries}, metric)
    if best is None:
        if entries:
            problem = f"no published evaluation has {metric}"
        else:
            problem = "the evaluated checkpoints were deleted" if published else "no evaluation is published"
        raise ConfigError(f"--checkpoint best: {problem} in {config.run_folder}; give `last` or a step")
    return best
