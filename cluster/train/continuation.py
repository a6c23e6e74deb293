"""Whether a run can go on from its checkpoints with the recipe as it is now: found out before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from m2f.cluster.recipe.same_model import model_changes
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.label_space import ClassMatch, match_classes
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import RECIPE, list_checkpoints
from m2f.trainer.checkpoint.identity import IDENTITY, ModelIdentity
from m2f.trainer.checkpoint.weights import known_class_rows, start_file
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import TrainJob


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint says of its model."""

    recipe: str
    task: str
    classes: tuple[Category, ...] | None
    """None for a checkpoint from before version 0.2 whose data are gone."""


def check_continuation(job: TrainJob, storage: Storage) -> None:
    """Compare a job with the newest checkpoint of its run folder; nothing without one.

    Raises CheckpointError for another task, other classes or another model, which `data.accept_changes` does not allow
    either: weights and optimizer state would be taken for something else. Raises DataError where a new run starts from
    weights whose classes contradict those of its data.
    """
    assert job.identity is not None
    checkpoints = list_checkpoints(storage, job.run_folder)
    if not checkpoints and job.model.weights is not None:
        known_class_rows(job.identity, start_file(job.model.weights, storage), storage)
    for checkpoint in checkpoints:
        stored = _read(storage, checkpoint.url)
        if stored is None:
            continue
        remedy = (
            f"set it back, or train under another name from its weights (model.weights={checkpoint.url}), which keeps "
            "the rows of the classes that both have"
        )
        space = job.identity.label_spaces[0]
        if stored.task != space.task:
            raise CheckpointError(
                f"checkpoint {checkpoint.url} is of a model for the task {stored.task}, and data.task is {space.task}; "
                f"{remedy}"
            )
        if stored.classes is not None:
            _check_classes(stored.classes, space.classes, checkpoint.url, remedy)
        changes = model_changes(stored.recipe, job.recipe, optimizer=True)
        if changes:
            raise CheckpointError(
                f"checkpoint {checkpoint.url} is of another model than the recipe's (checkpoint -> recipe):\n  "
                + "\n  ".join(changes)
                + f"\n{remedy}"
            )
        return


def _check_classes(stored: tuple[Category, ...], now: tuple[Category, ...], url: str, remedy: str) -> None:
    if [(c.name, c.is_thing) for c in stored] == [(c.name, c.is_thing) for c in now]:
        return  # ids and colours are not in the weights
    longest = max(len(stored), len(now))
    rows = zip(*((*table, *(None,) * (longest - len(table))) for table in (stored, now)), strict=True)
    differing = tuple((a, b) for a, b in rows if a is None or b is None or (a.name, a.is_thing) != (b.name, b.is_thing))
    found = ClassMatch(match_classes(stored, now).kind, (), differing)
    raise CheckpointError(
        f"checkpoint {url} has other classes than the training data, label by label; {remedy}:\n  "
        + found.describe_rows("checkpoint", "data")
    )


def _read(storage: Storage, url: str) -> _Stored | None:
    """None where the checkpoint does not say: the trainer finds out whether it is damaged."""
    if storage.exists(join(url, IDENTITY)):
        try:
            identity = ModelIdentity.from_json(storage.get(join(url, IDENTITY)), join(url, IDENTITY))
        except CheckpointError:
            return None
        return _Stored(identity.recipe, identity.tasks[0], identity.label_spaces[0].classes)
    if not storage.exists(join(url, RECIPE)):
        return None
    recipe = storage.get(join(url, RECIPE)).decode()
    try:
        content = yaml.safe_load(recipe)
        task, first = content["data"].get("task", "panoptic"), content["data"]["train"][0]["dataset"]
        shards = content["datasets"][first]["shards"]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None
    try:
        classes = Manifest.load(shards, storage).categories.for_task(task)
    except DataError:
        classes = None
    return _Stored(recipe, task, classes)
