"""Check whether a recipe describes the model that weights belong to, and list the differences."""

from __future__ import annotations

import re
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import describe_changes, dump_recipe, flatten_tree, require_no_problems
from m2f.cluster.recipe.retired import apply_renames, drop_retired
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.identity import ModelIdentity

_CHANGEABLE = re.compile(
    r"model\.(loss\.|postprocess\.|pilots\.|freeze|weights$|num_classes$)|model\.backbone\.(pretrained|weights|drop_path)$"
    r"|model\..*\.(dropout|checkpointing|annealing|annealing_power)$|model\.backbone\.options\.\w*drop\w*$"
)
"""Settings of `model` that may differ for the same weights."""
_OPTIONS = "model.backbone.options."
"""Prefix of settings that a recipe contains only if they differ from timm's defaults."""
_PRECISION = "training.precision"
_GROUPS = ("layer_decay", "layer_decay_from", "layer_decay_spared", "decay_everything")
_OPTIMIZER = (_PRECISION, *(f"training.optimizer.{name}" for name in _GROUPS))
"""Settings that the stored optimizer state depends on, besides `model.freeze` and whether there are pilots."""


def model_changes(stored: str, now: str, optimizer: bool = False) -> tuple[str, ...]:
    """Return lines `setting: stored -> now` for the settings in which the models of two recipes (YAML) differ.

    Settings that only one of the recipes has belong to another version of m2f and are ignored, except for timm
    options. If `optimizer` is set, settings that the optimizer state depends on are also compared.

    Raises:
        ConfigError: a recipe is not valid YAML, or has a deleted setting whose value is not its old default.
    """
    before, after = (_settings(text, optimizer) for text in (stored, now))
    for settings in (before, after):
        if settings.get(_PRECISION) == "auto":  # not comparable; a resumed run keeps its precision
            del settings[_PRECISION]
    shared = before.keys() & after.keys() | {key for key in before.keys() | after.keys() if key.startswith(_OPTIONS)}
    return describe_changes(before, after, shared)


def require_same_model(identity: ModelIdentity, config: RunConfig, weights: str) -> None:
    """Raise ConfigError if the weights belong to a different task or model; the message lists the differences."""
    if config.data.task not in identity.tasks:
        raise ConfigError(
            f"{weights} is a model for the task {' and '.join(identity.tasks)}, but data.task is {config.data.task}; "
            f"set data.task={identity.tasks[0]}, or use weights of another model"
        )
    changes = model_changes(identity.recipe, dump_recipe(config))
    if changes:
        raise ConfigError(
            f"the model of {weights} differs from the recipe's; restore these settings, or use other weights "
            f"(weights -> recipe):\n  " + "\n  ".join(changes)
        )


def _settings(recipe: str, optimizer: bool) -> dict[str, str]:
    try:
        tree = parse_yaml(recipe) or {}
    except DocumentError as error:
        raise ConfigError(f"the recipe of the weights is not valid YAML ({error}); use other weights") from error
    problems: list[str] = []
    apply_renames(tree, problems)
    drop_retired(tree, problems)
    require_no_problems("the recipe of the weights", problems)
    flat = flatten_tree(_with_lists_as_text(tree))
    frozen = sorted(value for key, value in flatten_tree(tree).items() if key.startswith("model.freeze."))
    pilots = "0" if flat.get("model.pilots.max_targets", "0") == "0" else "above 0"
    return ({"model.freeze": str(frozen), "model.pilots.max_targets": pilots} if optimizer else {}) | {
        key: value
        for key, value in flat.items()
        if (key.startswith("model.") and not _CHANGEABLE.match(key) and key != _OPTIONS.rstrip("."))
        or (optimizer and key in _OPTIMIZER)
    }


def _with_lists_as_text(value: Any) -> Any:
    """Replace lists in a YAML tree by their text. A longer list, or a list instead of null, then counts as a change."""
    if isinstance(value, dict):
        return {key: _with_lists_as_text(item) for key, item in value.items()}
    return str(value) if isinstance(value, list) else value
