"""`m2f.evaluate`: compute the scores of a checkpoint, as `m2f eval` does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from m2f.cluster.api.model import to_overrides
from m2f.cluster.evaluation.offline import evaluate_checkpoint
from m2f.cluster.predict.choose_checkpoint import choose_checkpoint, open_recipe, recipe_of
from m2f.cluster.predict.sources import resolve_source
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.results.results import EvaluationResults


def evaluate(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, EvaluationResults]:
    """Evaluate a checkpoint on every evaluation set of its recipe. Nothing is written.

    Up to 500 images are evaluated in this process. For more images, several evaluation actors or a named cluster, Ray
    is used if it is installed. Both ways give equal results.

    Args:
        source: a run folder or checkpoint folder (local or `s3://`), a model of an MLflow registry
            (`models:/NAME@ALIAS`), or a recipe.
        checkpoint: "last" (the default), "best", a step, or the path of other weights.
        settings: settings of the recipe to change, by dotted name, such as
            `{"evaluation.sets": [{"dataset": "test"}]}`. Dictionaries are merged into the recipe; lists, and sections
            with `kind`, replace the recipe's value.

    Returns:
        Results by name of the evaluation set. `metrics()` and `per_class()` return per cent, `table()` returns text.

    Raises:
        ConfigError: the source is none of these, the recipe has no evaluation sets, or the checkpoint does not exist.
        DataError: a set cannot be read, or its classes contradict those of the model.
        EvaluationError: images could not be evaluated, or the weights belong to a different model.
    """
    address, overrides = resolve_source(os.fspath(source)), to_overrides(settings)
    config, default_checkpoint = open_recipe(address, overrides)
    selected = default_checkpoint if checkpoint is None else str(checkpoint)
    weights = choose_checkpoint(config, Storage(config.storage), selected)
    config = recipe_of(weights, address, overrides, config)
    with preserve_num_threads():
        evaluations = evaluate_checkpoint(config, weights.url, step=weights.step)
    return {evaluation.results.subject.label: evaluation.results for evaluation in evaluations}


@contextmanager
def preserve_num_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block, because an evaluation in this process changes it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
