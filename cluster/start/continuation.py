"""Check, before a run starts, whether it can continue from its checkpoints with the current recipe."""

from __future__ import annotations

from dataclasses import dataclass

from m2f.cluster.recipe.same_model import model_changes
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.errors import DataError, MissingObjectError
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import RECIPE, STATE, list_checkpoints
from m2f.trainer.checkpoint.identity import CLASS_CHANGE_REMEDY, IDENTITY, ModelIdentity, require_same_classes
from m2f.trainer.checkpoint.weights import check_start_weights
from m2f.trainer.data import open_shards
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import TrainJob
from m2f.trainer.state import TrainState


@dataclass(frozen=True)
class _Stored:
    """Recipe, task and classes of a checkpoint's model."""

    recipe: str
    task: str
    classes: tuple[Category, ...] | None
    """None if a version before 0.2 wrote the checkpoint and the manifest of its data cannot be read."""


def check_continuation(job: TrainJob, storage: Storage) -> None:
    """Compare a job with the newest checkpoint of its run folder; without a checkpoint, check the initial weights.

    Raises CheckpointError if the task, the classes or the model differ. `data.accept_changes` does not allow these
    changes, because weights and optimizer state would be misinterpreted. Also raises CheckpointError if the data order
    differs and `data.accept_changes` is not set. For a new run, raises the errors of `check_start_weights` if its
    initial weights do not fit.
    """
    assert job.identity is not None
    checkpoints = list_checkpoints(storage, job.run_folder)
    if not checkpoints:
        check_start_weights(job.identity, job.model, storage)
        return
    order = open_shards(job, storage).fingerprint
    for checkpoint in checkpoints:
        stored = _read(storage, checkpoint.url)
        if stored is None:
            continue
        _check_model(stored, job, job.identity, checkpoint.url)
        _check_order(order, job, storage, checkpoint.url)
        return


def _check_model(stored: _Stored, job: TrainJob, identity: ModelIdentity, checkpoint: str) -> None:
    """Raise one CheckpointError if the task, the classes or the model differ."""
    problems = []
    try:
        require_same_classes(stored.task, stored.classes, identity, checkpoint)
    except CheckpointError as error:
        problems.append(str(error))
    if changes := model_changes(stored.recipe, job.recipe, optimizer=True):
        lines = "\n  ".join(changes)
        problems.append(
            f"the model of checkpoint {checkpoint} differs from the recipe's (checkpoint -> recipe):\n  {lines}"
        )
        if len(problems) == 1:  # the other problem already states the remedy
            problems.append(CLASS_CHANGE_REMEDY)
    if problems:
        raise CheckpointError("\n".join(problems))


def _check_order(order: str, job: TrainJob, storage: Storage, checkpoint: str) -> None:
    url = join(checkpoint, STATE)
    try:
        state = TrainState.from_json(storage.get(url), url)
    except (CheckpointError, MissingObjectError):
        return  # the checkpoint is damaged, so the ranks will use the previous one
    state.with_order(order, checkpoint, job.data.accept_changes)


def newest_recipe(storage: Storage, run_folder: str) -> str | None:
    """Return the recipe (YAML) of the newest readable checkpoint of a run folder; None if there is none."""
    found = (_read(storage, checkpoint.url) for checkpoint in list_checkpoints(storage, run_folder))
    return next((stored.recipe for stored in found if stored is not None), None)


def _read(storage: Storage, url: str) -> _Stored | None:
    """Return recipe, task and classes of a checkpoint; None if they cannot be read.

    The trainer checks whether the checkpoint is damaged.
    """
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
        content = parse_yaml(recipe)
        task, first = content["data"].get("task", "panoptic"), content["data"]["train"][0]["dataset"]
        shards = content["datasets"][first]["shards"]
    except (DocumentError, LookupError, TypeError, AttributeError):
        return None
    try:
        classes = Manifest.load(shards, storage).categories.for_task(task)
    except DataError:
        classes = None
    return _Stored(recipe, task, classes)
