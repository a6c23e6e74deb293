"""Defaults that follow from other settings, filled into a recipe as it was written."""

from __future__ import annotations

from typing import Any

from m2f.data_pipeline.categories import TASKS
from m2f.data_pipeline.config import DataConfig

_VALIDATION_NAMES = ("val", "valid", "validation")


def fill_defaults(tree: dict[str, Any]) -> None:
    """Evaluate on the validation set, if there is one, for the task of the training, where the recipe says nothing.

    Changes the tree in place. What it cannot read is left to the checks of the whole recipe.
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
