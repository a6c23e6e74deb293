"""`m2f eval`: one checkpoint on all sets of a recipe, with a progress line.

Few images are evaluated in this process, as Ray takes long to start; all where Ray is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from m2f.cluster.environment import names_cluster, uses_ray
from m2f.cluster.evaluation.actor import evaluated_rows
from m2f.cluster.evaluation.evaluate import Pool, SetEvaluation, evaluate_sets
from m2f.cluster.evaluation.local_pool import LocalPool
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import SeenDevices, announced, evaluation_devices, gpus_of_machine
from m2f.cluster.terminal import Progress
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationSet
from m2f.model.errors import ConfigError

FEW_IMAGES = 500
"""Images that one actor evaluates no faster than this process does."""


def evaluate_checkpoint(
    config: RunConfig, checkpoint: str, step: int | None = None, dump: str | None = None
) -> tuple[SetEvaluation, ...]:
    """Evaluate a checkpoint folder or a file of weights, with a progress line.

    Nothing is written, except predictions where `dump` is a folder or URL that all actors reach. `step` is the
    optimizer step of a checkpoint; results then equal those that training publishes, byte for byte.
    Raises ConfigError without sets, and what `evaluate_sets` raises.
    """
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty: name at least one set, for example [{dataset: val}]")
    if _is_little(config) or find_spec("ray") is None:
        config = announced(evaluation_devices(config, SeenDevices(gpus_of_machine())))
        return _evaluate(config, LocalPool(config), checkpoint, step, dump)
    return _evaluate_on_ray(config, checkpoint, step, dump)


def _evaluate_on_ray(
    config: RunConfig, checkpoint: str, step: int | None, dump: str | None
) -> tuple[SetEvaluation, ...]:
    from m2f.cluster.evaluation.client import make_pool
    from m2f.cluster.ray_cluster import cluster_devices, local_or_existing

    settings = config.evaluation
    may_grow = names_cluster(config.cluster.address)
    num_cpus = max(1, round(settings.actors * settings.num_cpus_per_actor))
    with local_or_existing(config.cluster, num_cpus, resources=settings.resources_per_actor):
        config = announced(evaluation_devices(config, cluster_devices(may_grow)))
        return _evaluate(config, make_pool(config), checkpoint, step, dump)


def _is_little(config: RunConfig) -> bool:
    """Whether one actor would evaluate at most FEW_IMAGES images, on no cluster that is named."""
    if uses_ray(config.cluster.address) or config.evaluation.actors > 1:
        return False
    storage = Storage(config.storage)
    manifests = [(Manifest.load(config.datasets[s.dataset].shards, storage), s) for s in config.evaluation.sets]
    return sum(len(evaluated_rows(manifest, evaluated)) for manifest, evaluated in manifests) <= FEW_IMAGES


def _evaluate(
    config: RunConfig, pool: Pool, checkpoint: str, step: int | None, dump: str | None
) -> tuple[SetEvaluation, ...]:
    """All sets, with a progress line for each; the pool is closed at the end."""
    bars: dict[EvaluationSet, Progress] = {}

    def show(evaluated: EvaluationSet, done: int, total: int) -> None:
        if evaluated not in bars:
            bars[evaluated] = Progress(f"evaluate {evaluated.label}", total, "calls").__enter__()
        bars[evaluated].advance(1)
        if done == total:
            bars[evaluated].__exit__(None, None, None)

    try:
        return evaluate_sets(config, pool, checkpoint, step, show, dump)
    finally:
        pool.close()
