"""Defaults that depend on other settings, filled into the tree of a recipe."""

from __future__ import annotations

from typing import Any

from m2f.data_pipeline.categories import TASKS
from m2f.data_pipeline.config import DataConfig
from m2f.model.errors import ConfigError
from m2f.model.weights.packages import packaged_weights
from m2f.model.weights.sources import PACKAGE

_VALIDATION_NAMES = ("val", "valid", "validation")


def fill_defaults(tree: dict[str, Any]) -> None:
    """Set the defaults of `evaluation`: the task of the training data, and the validation set if there is one.

    Changes the tree in place. Malformed sections are left unchanged; the checks of the whole recipe report them.
    """
    data, datasets, evaluation = (tree.get(name) for name in ("data", "datasets", "evaluation"))
    if evaluation is None:
        evaluation = tree["evaluation"] = {}
    if not all(isinstance(section, dict) for section in (data, datasets, evaluation)):
        return
    assert data is not None
    task = data.get("task", DataConfig.task)
    if task in TASKS:
        evaluation.setdefault("tasks", [task])
    validation = [name for name in _VALIDATION_NAMES if name in (datasets or {})]
    if validation and "sets" not in evaluation:
        evaluation["sets"] = [{"dataset": validation[0]}]


def fill_input_rules(tree: dict[str, Any]) -> list[str]:
    """Set the pixel mean and standard deviation that packaged backbone weights expect, unless the recipe sets them.

    Changes the tree in place. Returns a message for each value that was set, and for each value in the recipe that
    differs.
    """
    model = tree.get("model")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    weights = backbone.get("weights") if isinstance(backbone, dict) else None
    if not isinstance(model, dict) or not isinstance(weights, str) or not weights.startswith(PACKAGE):
        return []
    try:
        package = packaged_weights(weights)
    except ConfigError:
        return []  # the checks of the whole recipe report this
    rules = {"pixel_mean": list(package.pixel_mean), "pixel_std": list(package.pixel_std)}
    filled = {name: values for name, values in rules.items() if name not in model}
    conflicting = {name: values for name, values in rules.items() if name in model and model[name] != values}
    model.update(filled)
    lines = [f"model.{name} is {values}, as {weights} expects" for name, values in filled.items()]
    lines += [f"model.{name} is {model[name]}, but {weights} expects {values}" for name, values in conflicting.items()]
    return lines
