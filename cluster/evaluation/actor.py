"""One evaluation actor: keeps the model of one checkpoint and turns runs of images into metric states.

Also defines which images belong together, so that results do not depend on which actor computes them.
"""

from __future__ import annotations

import os
import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.loading.loader import eval_batches
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.config import EvaluationSet
from m2f.eval.errors import EvaluationError
from m2f.eval.inference.evaluator import Evaluator
from m2f.eval.report.dump import ResultDump
from m2f.eval.results.states import EvaluationStates
from m2f.model.config import ModelConfig
from m2f.model.inference.cuda_graphs import replay_forward
from m2f.model.mask2former import Mask2Former, build_model
from m2f.model.weights.load import load_weights
from m2f.trainer.checkpoint.folder import AVERAGE, WEIGHTS

IMAGES_PER_CALL = 8
"""Images that one call evaluates: enough to share a ranged read, few enough to spread over actors."""


@dataclass(frozen=True)
class EvaluationTask:
    """What all calls of one evaluation have in common."""

    weights: str
    """Path or URL of the model's weights."""
    evaluated: EvaluationSet
    drawn: tuple[int, ...] = ()
    """Rows of the manifest to draw panels of, one per call, in place of the evaluation of the set."""
    dump: str | None = None
    """Folder or URL that every call stores its predictions in."""


def evaluated_rows(manifest: Manifest, evaluated: EvaluationSet) -> np.ndarray:
    """Rows of the manifest that are evaluated, in its order."""
    return np.arange(manifest.num_samples)[: evaluated.limit]


def call_rows(manifest: Manifest, evaluated: EvaluationSet, batch_size: int) -> list[np.ndarray]:
    """The rows of every call: whole forward batches, fixed by the manifest's order."""
    rows = evaluated_rows(manifest, evaluated)
    per_call = batch_size * max(1, IMAGES_PER_CALL // batch_size)
    return [rows[start : start + per_call] for start in range(0, len(rows), per_call)]


class MemoryPeak(NamedTuple):
    """Bytes."""

    host: int
    gpu: int


class EvaluationActor:
    """Runs as a Ray actor. Models and manifests are loaded when they are first needed; the last model is kept."""

    def __init__(self, config: RunConfig) -> None:
        if not config.evaluation.num_gpus_per_actor:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the machine's GPUs are not ours
        torch.set_num_threads(config.evaluation.threads)
        self._config = config
        self._storage = Storage(config.storage)
        self._manifests: dict[str, Manifest] = {}
        self._loaded: tuple[tuple[str, str], Mask2Former] | None = None

    def ping(self) -> None:
        """Answer, as proof of life."""

    def peak_memory(self) -> MemoryPeak:
        """The most that this process has held so far."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return MemoryPeak(host, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def evaluate(self, task: EvaluationTask, call: int) -> bytes:
        """States of one call's images, as bytes."""
        settings = self._config.evaluation.for_set(task.evaluated)
        manifest = self._manifest(task.evaluated.dataset)
        if task.drawn:
            rows = drawn = np.array(task.drawn[call : call + 1])
        else:
            rows = call_rows(manifest, task.evaluated, settings.batch_size)[call]
            drawn = evaluated_rows(manifest, task.evaluated)[: settings.panels]
        dump = None if task.dump is None else ResultDump(manifest.categories)
        evaluator = Evaluator(
            self._model(task, manifest),
            manifest.categories,
            settings,
            model_task=self._config.data.task,
            postprocess=self._config.model.postprocess,
            test_time=task.evaluated.test_time,
            panel_ids=manifest.image_id[drawn].tolist(),
            dump=dump,
        )
        states = EvaluationStates.empty(manifest.categories, settings.tasks, settings.extra_metrics)
        batches = eval_batches(
            manifest,
            rows.tolist(),
            self._storage,
            batch_size=settings.batch_size,
            shortest_edge=settings.shortest_edge,
            max_size=settings.max_size,
        )
        for batch in batches:
            states.merge(evaluator.evaluate_batch(batch))
        if dump is not None:
            dump.store(self._storage, str(task.dump), call)
        return states.to_bytes()

    def _manifest(self, dataset: str) -> Manifest:
        if dataset not in self._manifests:
            self._manifests[dataset] = Manifest.load(self._config.datasets[dataset].shards, self._storage)
        return self._manifests[dataset]

    def _model(self, task: EvaluationTask, manifest: Manifest) -> Mask2Former:
        wanted = task.weights, task.evaluated.dataset
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # frees the memory of the last one first
            model = load_model(self._config, manifest, task.weights, self._storage)
            if self._config.evaluation.cuda_graphs:
                replay_forward(model)
            self._loaded = wanted, model
        return self._loaded[1]


def load_model(config: RunConfig, manifest: Manifest, weights: str, storage: Storage) -> Mask2Former:
    """The recipe's model for the classes of a data set with these weights; see `model_with_weights`."""
    num_classes = len(manifest.categories.for_task(config.data.task))
    return model_with_weights(replace(config.model, num_classes=num_classes), weights, storage)


def model_with_weights(config: ModelConfig, weights: str, storage: Storage) -> Mask2Former:
    """The model with weights from a URL, a file or a local folder, for inference, on the GPU where there is one.

    Raises EvaluationError if the weights are not those of the whole model, WeightsError if they are of another one.
    """
    model = build_model(config, pretrained_backbone=False)
    with tempfile.TemporaryDirectory(prefix="m2f-weights-") as folder:
        path = Path(weights)
        if "://" in weights:
            path = Path(folder) / weights.rpartition("/")[2]
            storage.get_file(weights, path)
        report = load_weights(model, path)
    if not report.complete:
        raise EvaluationError(
            f"{weights} does not hold the whole model of the recipe with {config.num_classes} classes: {report}"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def weights_url(checkpoint: str, storage: Storage) -> str:
    """Weights of a checkpoint folder, the moving average where it has one; other files and folders as they are."""
    is_file = checkpoint.rsplit("/", 1)[-1].rpartition(".")[2] in ("safetensors", "pt", "pth", "pkl", "bin")
    if is_file:
        return checkpoint
    found = (url for name in (AVERAGE, WEIGHTS) if storage.exists(url := join(checkpoint, name)))
    return next(found, checkpoint)
