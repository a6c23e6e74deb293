"""The evaluation actor, which holds the model of one checkpoint and computes metric states of groups of images.

The grouping is fixed here, so that results do not depend on the number of actors or on which one gets a group.
"""

from __future__ import annotations

import resource
import socket
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from m2f.cluster.evaluation.weights import model_with_weights
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.loading.loader import eval_batches, eval_groups
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig, EvaluationSet
from m2f.eval.errors import EvaluationError
from m2f.eval.inference.classes import EvaluatedClasses, evaluated_classes
from m2f.eval.inference.evaluator import Evaluator
from m2f.eval.report.dump import ResultDump
from m2f.eval.results.states import EvaluationStates
from m2f.model.inference.cuda_graphs import replay_forward
from m2f.model.inference.precision import set_precision
from m2f.model.segmenter import Segmenter

IMAGES_PER_CALL = 8
"""Images per call: enough that a ranged read serves several images, few enough to balance the load between actors."""


@dataclass(frozen=True)
class EvaluationTask:
    """Parameters that all calls of one evaluation share."""

    weights: str
    """Path or URL of the model's weights."""
    evaluated: EvaluationSet
    model_classes: tuple[Category, ...] | None = None
    """Classes of the model by label. None if they are unknown; the classes of the data set are then used."""
    panel_rows: tuple[int, ...] = ()
    """Rows of the manifest for which panels are drawn, one row per call. If empty, calls evaluate the set."""
    dump: str | None = None
    """Folder or URL in which every call stores its predictions; None stores none."""
    weights_sha256: str | None = None
    """SHA-256 of the weights; None if no manifest states it. After a rollback, a URL may contain other weights."""


def evaluated_rows(manifest: Manifest, evaluated: EvaluationSet) -> np.ndarray:
    """Return the evaluated rows of the manifest, in its order: all of them, or the first `limit`."""
    return np.arange(manifest.num_samples)[: evaluated.limit]


def call_groups(
    manifest: Manifest, evaluated: EvaluationSet, settings: EvaluationConfig
) -> list[list[tuple[int, ...]]]:
    """Return the batches of every call, as rows of the manifest. They depend only on the manifest and the settings."""
    groups = eval_groups(
        manifest,
        evaluated_rows(manifest, evaluated).tolist(),
        batch_size=settings.batch_size,
        shortest_edge=settings.shortest_edge,
        max_size=settings.max_size,
        square=settings.pads_to_squares,
    )
    per_call = max(1, IMAGES_PER_CALL // settings.batch_size)
    return [groups[start : start + per_call] for start in range(0, len(groups), per_call)]


class MemoryPeak(NamedTuple):
    """Peak memory of a process in bytes, on the host and on its GPU."""

    host: int
    gpu: int


class EvaluationActor:
    """Evaluates batches of images, usually as a Ray actor.

    Models and manifests are loaded when they are first needed. Only the last model is kept.
    """

    def __init__(self, config: RunConfig, gpu: int = 0) -> None:
        """`gpu` is the index of the GPU among those that torch sees. It is ignored if actors have no GPU."""
        self._device = f"cuda:{gpu}" if config.evaluation.gpus_per_actor > 0 else "cpu"
        torch.set_num_threads(config.evaluation.threads)
        self._config = config
        self._storage = Storage(config.storage, known_reachable=True)
        self._manifests: dict[str, Manifest] = {}
        self._loaded: tuple[tuple[str, str | None, int], Segmenter] | None = None

    def ping(self) -> None:
        """Do nothing; if the call returns, the actor is alive."""

    def peak_memory(self) -> MemoryPeak:
        """Return the peak memory of this process so far. The GPU value is 0 if there is no GPU."""
        unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return MemoryPeak(host, torch.cuda.max_memory_allocated(self._device) if self._device != "cpu" else 0)

    def evaluate(self, task: EvaluationTask, call: int) -> bytes:
        """Evaluate the images of one call and return their metric states as bytes.

        Raises EvaluationError if the actor should have a GPU and torch sees none.
        """
        if self._device != "cpu" and not torch.cuda.is_available():
            raise EvaluationError(
                f"evaluation.num_gpus_per_actor is {self._config.evaluation.gpus_per_actor:g}, but torch sees no GPU "
                f"on {socket.gethostname()}; run `nvidia-smi` and `m2f doctor` there, or set it to 0"
            )
        settings = self._config.evaluation.for_set(task.evaluated)
        manifest = self._manifest(task.evaluated.dataset)
        if task.panel_rows:
            panel_rows = np.array(task.panel_rows[call : call + 1])
            groups = [(task.panel_rows[call],)]
        else:
            groups = call_groups(manifest, task.evaluated, settings)[call]
            panel_rows = evaluated_rows(manifest, task.evaluated)[: settings.panels]
        classes = classes_of(task, manifest, self._config)
        dump = None if task.dump is None else ResultDump(classes.categories)
        evaluator = Evaluator(
            self._model(task, classes),
            classes,
            settings,
            model_task=self._config.data.task,
            postprocess=self._config.model.postprocess,
            test_time=settings.test_time,
            panel_ids=manifest.image_id[panel_rows].tolist(),
            dump=dump,
        )
        states = EvaluationStates.empty(classes.categories, settings.tasks, settings.extra_metrics)
        batches = eval_batches(
            manifest,
            groups,
            self._storage,
            shortest_edge=settings.shortest_edge,
            max_size=settings.max_size,
            shrink=settings.shrink,
            square=settings.pads_to_squares,
        )
        for batch in batches:
            states.merge(evaluator.evaluate_batch(classes.restrict(batch)))
        if dump is not None:
            dump.store(self._storage, str(task.dump), call)
        return states.to_bytes()

    def _manifest(self, dataset: str) -> Manifest:
        if dataset not in self._manifests:
            self._manifests[dataset] = Manifest.load(self._config.datasets[dataset].shards, self._storage)
        return self._manifests[dataset]

    def _model(self, task: EvaluationTask, classes: EvaluatedClasses) -> Segmenter:
        key = task.weights, task.weights_sha256, len(classes.model_classes)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees the memory of the previous model first
            config = replace(self._config.model, num_classes=len(classes.model_classes))
            model = model_with_weights(config, task.weights, self._storage, device=self._device)
            set_precision(model, self._config.evaluation.precision)
            if self._config.evaluation.cuda_graphs:
                replay_forward(model)
            self._loaded = key, model
        return self._loaded[1]


def classes_of(task: EvaluationTask, manifest: Manifest, config: RunConfig) -> EvaluatedClasses:
    """Return the classes that model and data set share. Raises DataError if their classes contradict each other."""
    return evaluated_classes(manifest.categories, task.model_classes, config.data.task, task.evaluated.dataset)
