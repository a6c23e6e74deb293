"""Describe an evaluation for MLflow: the checkpoint as a logged model, and the metrics of every set."""

from __future__ import annotations

from m2f.cluster.evaluation.evaluate import SetEvaluation
from m2f.cluster.evaluation.queue import Entry, read_results
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.tracking.logged_models import EvaluatedCheckpoint, KeptCheckpoints, SetMetrics
from m2f.cluster.tracking.provenance import DataInput, data_input
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.commits import commit_name
from m2f.trainer.checkpoint.folder import list_checkpoints, parse_folder
from m2f.trainer.checkpoint.weights import manifest_sha256, weights_url


def evaluated_checkpoint(
    config: RunConfig, storage: Storage, url: str, step: int, commit: str = ""
) -> EvaluatedCheckpoint:
    """Describe a checkpoint of the run for MLflow. If `commit` is empty, it is looked up or derived from `url`."""
    name = url.rstrip("/").rpartition("/")[2]
    return EvaluatedCheckpoint(
        commit=commit or commit_name(storage, url) or f"{step:08d}-{parse_folder(url)[1]}",
        name=name,
        url=url,
        step=step,
        run_name=config.name,
        weights=manifest_sha256(weights_url(url, storage), storage),
    )


def make_set_metrics(config: RunConfig, storage: Storage, evaluation: SetEvaluation, label: str) -> SetMetrics:
    """Return the metrics of an evaluation, with names that start with `label`."""
    results = evaluation.results
    return SetMetrics(
        label=label,
        data=_data(config, storage, results.subject.dataset, results.subject.fingerprint, results.num_images),
        metrics=results.headline(label),
        per_class=results.per_class(),
    )


def read_set_metrics(config: RunConfig, storage: Storage, entry: Entry) -> tuple[SetMetrics, ...]:
    """Return the metrics of a published step, read from its files. Sets without intact results are omitted."""
    found = []
    for evaluated in config.evaluation.sets:
        content = read_results(config, storage, entry.step, evaluated.label)
        try:
            data = _data(config, storage, evaluated.dataset, str(content["fingerprint"]), int(content["num_images"]))
            per_class = [dict(row) for row in content["per_class"]]
        except StorageError:
            raise
        except (LookupError, TypeError, ValueError):
            continue
        prefix = f"{evaluated.label}/"
        metrics = {name: value for name, value in entry.metrics.items() if name.startswith(prefix)}
        found.append(SetMetrics(label=evaluated.label, data=data, metrics=metrics, per_class=per_class))
    return tuple(found)


def kept_checkpoints(storage: Storage, run_folder: str) -> KeptCheckpoints:
    """Return the names of the checkpoints that the run folder now contains, and the newest step."""
    found = list_checkpoints(storage, run_folder)
    newest = max((checkpoint.step for checkpoint in found), default=0)
    return KeptCheckpoints(names=frozenset(checkpoint.name for checkpoint in found), newest=newest)


def _data(config: RunConfig, storage: Storage, name: str, fingerprint: str, images: int) -> DataInput:
    """Describe the evaluated data set from its manifest, or from the results if the shards have changed since."""
    current = data_input(config, "evaluation", name, storage)
    if current is not None and current.fingerprint == fingerprint:
        return current
    return DataInput(name, "evaluation", config.datasets[name].shards, fingerprint, images, "{}")
