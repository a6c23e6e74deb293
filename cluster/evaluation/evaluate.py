"""Evaluate one checkpoint on all sets of a recipe with a pool of actors, and write the result files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from m2f.cluster.evaluation.actor import EvaluationTask, call_groups, classes_of, evaluated_rows
from m2f.cluster.evaluation.weights import model_classes
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.documents import DocumentError, parse_json
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.config import EvaluationSet, stored_test_time
from m2f.eval.inference.classes import evaluated_classes
from m2f.eval.inference.evaluator import check_extra_metrics, check_tasks
from m2f.eval.report.dump import join_dump
from m2f.eval.report.evaluation_page import details_json, evaluation_page
from m2f.eval.report.panels import contact_sheet
from m2f.eval.results.images import IMAGES_FILE, image_records, image_table
from m2f.eval.results.results import EvaluationResults, EvaluationSubject
from m2f.eval.results.settings import EvaluationSettings
from m2f.eval.results.states import EvaluationStates, check_complete, image_qualities
from m2f.model.weights.files import weights_sha256
from m2f.trainer.checkpoint.weights import fetched_weights, manifest_sha256, weights_url

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetEvaluation:
    """Results of one evaluation set."""

    results: EvaluationResults
    panels: dict[int, bytes]
    """PNG panels of the first `evaluation.panels` images, by image id."""
    worst: dict[int, bytes]
    """PNG panels of the images with the lowest quality, by image id, the worst first."""
    images: bytes
    """Table with metrics and match records of every image, see `m2f.eval.results.images`."""

    def files(self) -> dict[str, bytes]:
        """Return the contents of the result files, by file name."""
        files = {
            "results.json": self.results.to_json().encode(),
            "results.txt": self.results.table().encode(),
            "details.json": details_json(self.results).encode(),
            "report.html": evaluation_page(self.results, self.panels, self.worst).encode(),
            IMAGES_FILE: self.images,
        }
        if self.panels:
            files["panels.jpg"] = contact_sheet([self.panels[i] for i in sorted(self.panels)])
        if self.worst:
            files["worst.jpg"] = contact_sheet(list(self.worst.values()))
        return files


SPILL_BYTES = 2**27
"""Bytes that the state of a metric may keep in memory during an evaluation. Larger states are spilled to files."""


class Pool(Protocol):
    """Interface of EvaluationPool and LocalPool, which run the calls of an evaluation."""

    def run(self, task: EvaluationTask, batches: Iterable[int], on_result: Callable[[int, bytes], None]) -> None:
        """Evaluate all calls and pass every result to `on_result(call, states)` once.

        Raises EvaluationError if a call fails.
        """
        ...

    def ask(self, method: str) -> list[Any]:
        """Call a method without arguments on the actors and return their answers."""
        ...

    def close(self) -> None:
        """End the actors of the pool."""
        ...


OnProgress = Callable[[EvaluationSet, int, int], None]
"""Callback for progress, called with the set, the number of finished calls and the number of all calls."""


def check_sets(config: RunConfig) -> None:
    """Check, before training, for mistakes that would make every evaluation fail.

    Raises:
        ConfigError: a model of `data.task` does not support an evaluated task, or a set does not support a metric.
        DataError: a set does not exist, or its classes contradict those of the training data.
    """
    if not config.evaluation.sets:
        return
    settings = [config.evaluation.for_set(evaluated) for evaluated in config.evaluation.sets]
    for each in settings:
        check_tasks(config.data.task, each.tasks)
    storage = Storage(config.storage)
    names = [config.data.train[0].dataset, *(s.dataset for s in config.evaluation.sets)]
    trained, *others = [Manifest.load(config.datasets[name].shards, storage).categories for name in names]
    task = config.data.task
    for each, name, table in zip(settings, names[1:], others, strict=True):
        classes = evaluated_classes(table, trained.for_task(task), task, name)
        check_extra_metrics(classes.categories, each.extra_metrics)


def evaluate_sets(
    config: RunConfig,
    pool: Pool,
    checkpoint: str,
    step: int | None,
    on_progress: OnProgress,
    dump: str | None = None,
) -> tuple[SetEvaluation, ...]:
    """Evaluate a checkpoint on all sets and return the results in the recipe's order.

    If `dump` is a folder or URL, the predictions are stored in `dump/SET`, see `m2f.eval.report.dump`.

    Raises:
        ConfigError: the weights belong to a different task or model than the recipe.
        EvaluationError: images could not be evaluated, or the weights do not cover the whole model.
        DataError, StorageError: a set cannot be read.
    """
    storage = Storage(config.storage)
    weights = weights_url(checkpoint, storage)
    classes = model_classes(config, weights, storage)
    sha256 = _sha256_of(weights, storage)
    return tuple(
        _evaluate(
            config,
            storage,
            pool,
            EvaluationTask(weights, s, classes, dump=dump and join(dump, s.label), weights_sha256=sha256),
            step,
            on_progress,
        )
        for s in config.evaluation.sets
    )


def _sha256_of(weights: str, storage: Storage) -> str:
    """Return the SHA-256 of weights, from the manifest of their checkpoint if it lists them."""
    listed = manifest_sha256(weights, storage)
    if listed is not None:
        return listed
    with fetched_weights(weights, storage) as path:
        return weights_sha256(path)


def results_name(storage: Storage, folder: str, results: EvaluationResults) -> str:
    """Return the name under which results are stored: the label of the set, `LABEL.DIGEST` or `LABEL.DIGEST.DATA`.

    The digest is appended if `folder` already contains results for this label with different settings or weights. If
    these are results of different data, the start of the data's fingerprint is appended, too. `m2f eval` with different
    settings or data therefore does not overwrite published files and metrics. Results of version 0.1 contain no
    settings; they count as the same if their metrics are equal. Damaged results count as different.
    """
    label, settings, fingerprint = results.subject.label, results.subject.settings, results.subject.fingerprint
    url = join(folder, label, "results.json")
    if settings is None or not storage.exists(url):
        return label
    try:
        published = parse_json(storage.get(url))
    except DocumentError:
        published = None
    name = f"{label}.{settings.digest}"
    if not isinstance(published, dict):
        return name
    if published.get("fingerprint", fingerprint) != fingerprint:
        return f"{name}.{fingerprint[:8]}"
    if "settings_digest" in published:
        is_same = published["settings_digest"] == settings.digest
    else:
        is_same = published.get("metrics") == results.metrics()
    return label if is_same else name


def write_files(storage: Storage, url: str, files: dict[str, bytes], local: str | os.PathLike[str]) -> Path | None:
    """Store files under `url` and return a local folder with them: `url` itself, or `local` if `url` is remote.

    If the disk refuses the copy in `local`, log a warning and return None.
    """
    for name, data in files.items():
        storage.put(join(url, name), data)
    if "://" not in url:
        return Path(url)
    folder = Path(local)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        LOGGER.warning("%s: these results are not copied to MLflow (%s); free some space on this machine", url, error)
        return None
    return folder


def _evaluate(
    config: RunConfig,
    storage: Storage,
    pool: Pool,
    task: EvaluationTask,
    step: int | None,
    on_progress: OnProgress,
) -> SetEvaluation:
    evaluated, dump = task.evaluated, task.dump
    manifest = Manifest.load(config.datasets[evaluated.dataset].shards, storage)
    rows = evaluated_rows(manifest, evaluated)
    calls = len(call_groups(manifest, evaluated, config.evaluation))
    classes = classes_of(task, manifest, config)
    settings = config.evaluation.for_set(evaluated)
    states = EvaluationStates.empty(classes.categories, settings.tasks, settings.extra_metrics)
    subject = EvaluationSubject(
        dataset=evaluated.dataset,
        name=evaluated.name,
        fingerprint=manifest.fingerprint,
        classes=classes.note,
        subset=None if len(rows) == manifest.num_samples else f"first {len(rows)} of {manifest.num_samples}",
        test_time=settings.test_time.describe(),
        step=step,
        settings=_settings(config, evaluated, task.weights_sha256),
    )
    qualities: dict[int, float] = {}
    done: list[int] = []
    with ScratchFolder("states") as spill_folder:

        def on_result(call: int, payload: bytes) -> None:
            part = EvaluationStates.from_bytes(payload)
            qualities.update(image_qualities(part))
            states.merge(part)
            states.spill(spill_folder, SPILL_BYTES)
            done.append(call)
            on_progress(evaluated, len(done), calls)

        pool.run(task, range(calls), on_result)
        check_complete(states, manifest.image_id[rows].tolist())
        results = states.compute(classes.categories, subject)
        names = dict(zip(manifest.image_id[rows].tolist(), manifest.key[rows].tolist(), strict=True))
        images = image_table(image_records(states.panoptic, states.instance, states.semantic), names)
    if dump is not None:
        join_dump(storage, dump, calls, classes.categories)
    worst = _draw_worst(config.evaluation.panels // 2, manifest, pool, task, qualities)
    return SetEvaluation(results, states.panels, worst, images)


def _settings(config: RunConfig, evaluated: EvaluationSet, weights: str | None) -> EvaluationSettings:
    settings = config.evaluation.for_set(evaluated)
    return EvaluationSettings(
        tasks=settings.tasks,
        extra_metrics=settings.extra_metrics,
        shortest_edge=settings.shortest_edge,
        max_size=settings.max_size,
        shrink=settings.shrink,
        precision=settings.precision,
        batch_size=settings.batch_size,
        limit=evaluated.limit,
        test_time=stored_test_time(settings.test_time),
        postprocess=asdict(config.model.postprocess),
        weights=weights,
    )


def _draw_worst(
    count: int, manifest: Manifest, pool: Pool, task: EvaluationTask, qualities: Mapping[int, float]
) -> dict[int, bytes]:
    """Draw panels of the `count` images with the lowest quality and return them by image id, the worst first.

    This needs a second pass, because the worst images are known only after the evaluation.
    """
    worst = sorted(qualities, key=lambda image_id: (qualities[image_id], image_id))[:count]
    if not worst:
        return {}
    row_of = {image_id: row for row, image_id in enumerate(manifest.image_id.tolist())}
    panel_task = replace(task, panel_rows=tuple(row_of[image_id] for image_id in worst), dump=None)
    panels: dict[int, bytes] = {}
    pool.run(
        panel_task, range(len(worst)), lambda call, payload: panels.update(EvaluationStates.from_bytes(payload).panels)
    )
    return {image_id: panels[image_id] for image_id in worst}
