"""Evaluation of one checkpoint on all sets of a recipe, for `m2f eval` and `m2f.evaluate`.

Small evaluations run in this process, because Ray takes long to start. If Ray is not installed, all evaluations do.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from m2f.cluster.environment import is_external_cluster, uses_ray
from m2f.cluster.evaluation.actor import evaluated_rows
from m2f.cluster.evaluation.evaluate import Pool, SetEvaluation, evaluate_sets
from m2f.cluster.evaluation.local_pool import LocalPool
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import AvailableDevices, evaluation_devices, local_gpus, print_device_summary
from m2f.cluster.terminal import Progress
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationSet
from m2f.model.errors import ConfigError

MAX_LOCAL_IMAGES = 500
"""Up to this number of images, evaluation in this process is at least as fast as starting a Ray actor for it."""


def evaluate_checkpoint(
    config: RunConfig, checkpoint: str, step: int | None = None, dump: str | None = None
) -> tuple[SetEvaluation, ...]:
    """Evaluate a checkpoint folder or weight file on all sets, with a progress line for each set.

    Args:
        config: recipe with at least one evaluation set.
        checkpoint: path or URL of the checkpoint folder or weight file.
        step: optimizer step of the checkpoint. With it, the results are byte-identical to those of training.
        dump: folder or URL, accessible to all actors, in which predictions are stored. Nothing else is written.

    Raises:
        ConfigError: the recipe has no evaluation sets, or the checkpoint belongs to a different task or model.
        EvaluationError, DataError, StorageError: see `evaluate_sets`.
    """
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty: add at least one set, for example [{dataset: val}]")
    if _is_small(config) or find_spec("ray") is None:
        config = print_device_summary(evaluation_devices(config, AvailableDevices(local_gpus())))
        return _evaluate(config, LocalPool(config), checkpoint, step, dump)
    return _evaluate_on_ray(config, checkpoint, step, dump)


def _evaluate_on_ray(
    config: RunConfig, checkpoint: str, step: int | None, dump: str | None
) -> tuple[SetEvaluation, ...]:
    from m2f.cluster.evaluation.client import make_pool
    from m2f.cluster.ray_cluster import cluster_devices, existing_or_local_cluster

    settings = config.evaluation
    may_grow = is_external_cluster(config.cluster.address)
    num_cpus = max(1, round(settings.actors * settings.num_cpus_per_actor))
    with existing_or_local_cluster(config.cluster, num_cpus, resources=settings.resources_per_actor):
        config = print_device_summary(evaluation_devices(config, cluster_devices(may_grow)))
        return _evaluate(config, make_pool(config), checkpoint, step, dump)


def _is_small(config: RunConfig) -> bool:
    """Return whether there are at most MAX_LOCAL_IMAGES images, one actor and no Ray cluster."""
    if uses_ray(config.cluster.address) or config.evaluation.actors > 1:
        return False
    storage = Storage(config.storage)
    manifests = [(Manifest.load(config.datasets[s.dataset].shards, storage), s) for s in config.evaluation.sets]
    return sum(len(evaluated_rows(manifest, evaluated)) for manifest, evaluated in manifests) <= MAX_LOCAL_IMAGES


def _evaluate(
    config: RunConfig, pool: Pool, checkpoint: str, step: int | None, dump: str | None
) -> tuple[SetEvaluation, ...]:
    """Evaluate all sets with a progress line for each, and close the pool."""
    bars: dict[EvaluationSet, Progress] = {}  # of unfinished sets

    def show(evaluated: EvaluationSet, done: int, total: int) -> None:
        if evaluated not in bars:
            bars[evaluated] = Progress(f"evaluate {evaluated.label}", total, "batches").__enter__()
        bars[evaluated].advance(1)
        if done == total:
            bars.pop(evaluated).__exit__(None, None, None)

    try:
        return evaluate_sets(config, pool, checkpoint, step, show, dump)
    finally:
        for bar in bars.values():
            bar.__exit__(*sys.exc_info())
        pool.close()
