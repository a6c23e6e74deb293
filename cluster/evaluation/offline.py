"""`m2f eval`: one checkpoint on all sets of a recipe, on a Ray cluster, with a progress line."""

from __future__ import annotations

import os

import ray

from m2f.cluster.evaluation.client import make_pool
from m2f.cluster.evaluation.evaluate import SetEvaluation, evaluate_sets
from m2f.cluster.ray_cluster import local_or_existing
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import SeenDevices, announced, evaluation_devices, gpus_of_nodes
from m2f.cluster.terminal import Progress
from m2f.eval.config import EvaluationSet
from m2f.model.errors import ConfigError


def evaluate_checkpoint(
    config: RunConfig, checkpoint: str, step: int | None = None, dump: str | None = None
) -> tuple[SetEvaluation, ...]:
    """Evaluate a checkpoint folder or a file of weights on a Ray cluster, with a progress line.

    Nothing is written, except predictions where `dump` is a folder or URL that all actors reach. `step` is the
    optimizer step of a checkpoint; results then equal those that training publishes, byte for byte.
    Raises ConfigError without sets, and what `evaluate_sets` raises.
    """
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty: name at least one set, for example [{dataset: val}]")
    settings = config.evaluation
    may_grow = config.cluster.address is not None or "RAY_ADDRESS" in os.environ
    num_cpus = max(1, round(settings.actors * settings.num_cpus_per_actor))
    with local_or_existing(config.cluster, num_cpus, resources=settings.resources_per_actor):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        seen = SeenDevices(gpus_of_nodes(nodes), found="the Ray cluster has", may_grow=may_grow)
        config = announced(evaluation_devices(config, seen))
        pool = make_pool(config)
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
