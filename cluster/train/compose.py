"""Build a training job from a recipe."""

from __future__ import annotations

from dataclasses import replace

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.identity import identity_of
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.recipe.stored import store_recipe
from m2f.cluster.start.evaluator_memory import evaluator_bytes
from m2f.cluster.terminal import print_err
from m2f.data_pipeline.categories import require_classes
from m2f.data_pipeline.loading.loader import mixture_labels
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.warnings import data_warnings
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import list_checkpoints
from m2f.trainer.engine.schedule import schedule_warnings
from m2f.trainer.job import TrainJob
from m2f.trainer.recovery.adjustments import Adjustments


def compose_job(config: RunConfig, storage: Storage | None = None) -> TrainJob:
    """Return the training job of a recipe. The number of classes comes from the categories of the training data.

    Raises:
        DataError, StorageError: a manifest of `data.train` is missing or damaged, or the manifests have different
            categories, or no category is a class of the task.
        ConfigError: the recipe sets `model.num_classes` to another number.
    """
    storage = storage or Storage(config.storage)
    shards = tuple(config.datasets[item.dataset].shards for item in config.data.train)
    manifests = [Manifest.load(s, storage) for s in shards]
    model = replace(config.model, num_classes=_num_classes(config, manifests))
    return TrainJob(
        run_folder=config.run_folder,
        model=model,
        data=config.data,
        shards=shards,
        training=config.training,
        storage=config.storage,
        seed=config.seed,
        recipe=dump_recipe(config),
        evaluates=bool(config.evaluation.sets),
        evaluator_bytes=evaluator_bytes(config, model),
        identity=identity_of(config, manifests[0].categories.for_task(config.data.task)),
    )


def begin_run(config: RunConfig, job: TrainJob, lease: int, storage: Storage) -> TrainJob:
    """Store the recipe, print changes since the first start and warnings, and return the job with its lease.

    Call this only while holding `lease`, after all checks have passed.
    """
    changed = store_recipe(storage, config, has_progress=bool(list_checkpoints(storage, config.run_folder)))
    if changed:
        lines = "\n  ".join(changed)
        print_err(f"settings differ from those of the first start of {config.run_folder}:\n  {lines}")
    for warning in schedule_warnings(config.training):
        print_err(warning)
    for name in dict.fromkeys(item.dataset for item in config.data.train):
        manifest = Manifest.load(config.datasets[name].shards, storage)
        for warning in data_warnings(name, manifest, config.data.task, config.model):
            print_err(warning)
    return replace(job, lease=lease)


def adjusted_job(config: RunConfig, job: TrainJob, adjustments: Adjustments) -> TrainJob:
    """Return the job with the run's adjustments applied, also to the recipe that its checkpoints store."""
    job = adjustments.applied(job)
    return replace(job, recipe=dump_recipe(replace(config, training=job.training)))


def _num_classes(config: RunConfig, manifests: list[Manifest]) -> int:
    mixture_labels(manifests, config.data.task)  # raises an error if the categories of data sets differ
    require_classes(manifests[0].categories, config.data.task, config.data.train[0].dataset)
    found = len(manifests[0].categories.for_task(config.data.task))
    if config.model.num_classes not in (None, found):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but the data sets have {found} classes for the task "
            f"{config.data.task}; remove the setting, which is derived from the data"
        )
    return found
