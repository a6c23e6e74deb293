"""Evaluated checkpoints as logged models of MLflow, with tables of metrics per class.

The models are external: MLflow stores their metrics and the URL of their checkpoint, whose files stay in the run
folder. An evaluation can be sent again without duplicates, because a process may die after it has sent an entry and
before it has recorded that.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from m2f.cluster.tracking.presentation import EXPERIMENT_KIND, MODEL_TRAINING
from m2f.cluster.tracking.provenance import DataInput
from m2f.cluster.tracking.store import METRICS_PER_CALL
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.scratch import ScratchFolder

LOGGER = logging.getLogger(__name__)
COMMIT_TAG = "m2f.commit"
"""Tag of a logged model that holds the name of its checkpoint's commit, which is unique within the run."""
CHECKPOINT_TAG = "m2f.checkpoint"
"""Tag of a logged model that holds the folder name of its checkpoint."""
URL_TAG = "m2f.checkpoint.url"
STEP_TAG = "m2f.step"
STATE_TAG = "m2f.checkpoint.state"
KEPT, DELETED = "kept", "deleted"
"""Values of STATE_TAG."""
MODEL_TYPE = "segmentation"
EXTERNAL_TAG = "mlflow.model.isExternal"
TABLES_TAG = "mlflow.loggedArtifacts"
_SHARED_TAGS = ("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")
"""Tags of the run that are copied to its models."""
TABLE_ATTEMPTS = 3
"""Attempts to write rows of a table that other processes may overwrite."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """A committed checkpoint that has been evaluated."""

    commit: str
    """Name of its commit."""
    name: str
    """Name of its folder."""
    url: str
    step: int
    run_name: str
    weights: str | None
    """SHA-256 of the evaluated weights; None if no manifest contains it."""

    @property
    def model_name(self) -> str:
        """Name of the logged model, without the characters that MLflow refuses."""
        return "".join("_" if c in "/:.%\"'" else c for c in f"{self.run_name}-{self.name}")

    def tags(self) -> dict[str, str]:
        """Return the tags of the logged model."""
        tags = {
            COMMIT_TAG: self.commit,
            CHECKPOINT_TAG: self.name,
            URL_TAG: self.url,
            STEP_TAG: str(self.step),
            STATE_TAG: KEPT,
            EXTERNAL_TAG: "true",
        }
        return tags if self.weights is None else tags | {"m2f.weights.sha256": self.weights}


@dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """Results of an evaluation on one set."""

    label: str
    """Label of the evaluation set; names of metrics begin with it."""
    data: DataInput
    metrics: Mapping[str, float]
    """Values by name, for example `val/PQ`."""
    per_class: Sequence[Mapping[str, Any]]
    """Rows of the table of classes."""

    def point(self, key: str, value: float, time_ms: int, step: int, model_id: str | None) -> Metric:
        """Return a metric of the run that is linked to this data set and, unless `model_id` is None, to a model."""
        digest = short_digest(self.data)
        return Metric(key, value, time_ms, step, model_id, dataset_name=self.data.name, dataset_digest=digest)


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoints:
    """Checkpoints that a run had at a given time."""

    names: Collection[str]
    """Names of their folders."""
    newest: int
    """Step of the newest checkpoint at that time. Nothing is known of later checkpoints."""


def linked_metric(stored: Metric, model_id: str | None, data: Metric) -> Metric:
    """Return the point `stored` of the run, linked to a model and to the data set of `data`."""
    links = {"dataset_name": data.dataset_name, "dataset_digest": data.dataset_digest}
    return Metric(stored.key, stored.value, stored.timestamp, stored.step, model_id, **links)


class LoggedModels:
    """Logged models of one MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        run = client.get_run(run_id)
        self._experiment = run.info.experiment_id
        self._run_tags = {name: run.data.tags[name] for name in _SHARED_TAGS if name in run.data.tags}
        self._has_models = self._supports_models()
        if EXPERIMENT_KIND not in client.get_experiment(self._experiment).tags:  # created by an earlier version
            client.set_experiment_tag(self._experiment, EXPERIMENT_KIND, MODEL_TRAINING)

    def ensure(self, checkpoint: EvaluatedCheckpoint) -> LoggedModel | None:
        """Return the model of a checkpoint. Create it, complete it or link it to the run if that has not been done yet.

        Returns None if the server does not support logged models.
        """
        if not self._has_models:
            return None
        model = self._find(checkpoint.commit)
        if model is None:
            created = self._create(checkpoint, checkpoint.model_name)
            model = self._find(checkpoint.commit) or created
            if model.model_id != created.model_id:  # another process created it first
                self._client.delete_logged_model(created.model_id)
        return self._complete(model, checkpoint.step)

    def create_another(self, checkpoint: EvaluatedCheckpoint, name: str) -> LoggedModel:
        """Create and return another model of a checkpoint that already has one."""
        return self._complete(self._create(checkpoint, name), checkpoint.step)

    def with_metrics_of(self, first: LoggedModel, other: LoggedModel) -> LoggedModel:
        """Log the metrics of `first` for `other`, another model of its checkpoint, and return `other` with them.

        The run gets no duplicates, because value, time and step are equal.
        """
        self.add_metrics(other, [linked_metric(metric, other.model_id, metric) for metric in first.metrics or ()])
        return self._client.get_logged_model(other.model_id)

    def find_tagged(self, commit: str, tag: str, value: str) -> LoggedModel | None:
        """Return a model of a commit whose tag `tag` has this value; None if there is none."""
        query = f"source_run_id = '{self._run_id}' AND tags.`{COMMIT_TAG}` = '{commit}'"
        return next((model for model in self._search(query) if model.tags.get(tag) == value), None)

    def _create(self, checkpoint: EvaluatedCheckpoint, name: str) -> LoggedModel:
        return self._client.create_logged_model(
            self._experiment,
            name,
            self._run_id,
            tags=self._run_tags | checkpoint.tags(),
            params={"step": str(checkpoint.step)},
            model_type=MODEL_TYPE,
        )

    def _complete(self, model: LoggedModel, step: int) -> LoggedModel:
        if model.status != LoggedModelStatus.READY:
            self._describe_external(model)
            model = self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(self._run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step)])
        return model

    def link_data(self, sets: Sequence[SetMetrics]) -> None:
        """Log the evaluated data sets as inputs of the run, except those that are already logged."""
        inputs = self._client.get_run(self._run_id).inputs
        known = {
            (dataset_input.dataset.name, dataset_input.dataset.digest)
            for dataset_input in (inputs.dataset_inputs if inputs else ())
        }
        new = [
            set_metrics.data
            for set_metrics in sets
            if (set_metrics.data.name, short_digest(set_metrics.data)) not in known
        ]
        if new:
            self._client.log_inputs(self._run_id, [dataset_input(data) for data in new])

    def update_states(self, kept: KeptCheckpoints) -> None:
        """Update the state tag of models whose checkpoints were deleted or exist again."""
        for model in self._search(f"source_run_id = '{self._run_id}'") if self._has_models else ():
            name, step = model.tags.get(CHECKPOINT_TAG), model.tags.get(STEP_TAG, "")
            if name is None or not step.isdecimal() or (name not in kept.names and int(step) > kept.newest):
                continue
            state = KEPT if name in kept.names else DELETED
            if model.tags.get(STATE_TAG) != state:
                self._client.set_logged_model_tags(model.model_id, {STATE_TAG: state})

    def add_metrics(self, model: LoggedModel | None, points: Sequence[Metric]) -> None:
        """Log metrics for the run and the model, without duplicates.

        Metrics that the model already has are skipped. If the run already has a metric, its point must have the stored
        value and time, so that MLflow ignores the duplicate.
        """
        known = {(metric.key, metric.dataset_digest) for metric in (model.metrics or () if model else ())}
        new = [point for point in points if (point.key, point.dataset_digest) not in known]
        for start in range(0, len(new), METRICS_PER_CALL):
            self._client.log_batch(self._run_id, new[start : start + METRICS_PER_CALL])

    def _supports_models(self) -> bool:
        try:
            self._client.search_logged_models([self._experiment], max_results=1)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            self._client.get_run(self._run_id)  # raises if the server is down and a proxy returned the error above
            LOGGER.warning(
                "tracking: this MLflow server does not support logged models; evaluations are logged to the run only"
            )
            return False
        return True

    def _find(self, commit: str) -> LoggedModel | None:
        """Return the oldest model of a commit; None if there is none."""
        query = f"source_run_id = '{self._run_id}' AND tags.`{COMMIT_TAG}` = '{commit}'"
        return min(self._search(query), key=lambda m: (m.creation_timestamp, m.model_id), default=None)

    def _search(self, query: str) -> Iterator[LoggedModel]:
        token: str | None = None
        while True:
            page = self._client.search_logged_models([self._experiment], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _describe_external(self, model: LoggedModel) -> None:
        """Log the MLmodel file that tells MLflow that the files of the model are stored elsewhere."""
        described = Model(
            artifact_path=model.artifact_location,
            run_id=self._run_id,
            model_id=model.model_id,
            metadata={EXTERNAL_TAG: True},
        )
        with ScratchFolder("model") as folder:
            described.save(str(folder / "MLmodel"))
            self._client.log_model_artifacts(model.model_id, str(folder))


def short_digest(data: DataInput) -> str:
    """Return the digest for MLflow, which allows at most 36 characters. The profile contains the whole fingerprint."""
    return data.fingerprint[:36]


def dataset_input(data: DataInput) -> DatasetInput:
    """Return the input for MLflow, with a source that `mlflow.data.get_source` can open."""
    scheme, _, rest = data.url.partition("://")
    uri, kind = (data.url, scheme) if rest else (os.path.abspath(data.url), "local")
    dataset = Dataset(data.name, short_digest(data), kind, json.dumps({"uri": uri}), profile=data.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


def write_table(client: MlflowClient, run_id: str, step: int, set_metrics: SetMetrics) -> None:
    """Write the rows of a step to the table of the set's classes, replacing earlier rows of that step.

    The format is that of `MlflowClient.log_table`, which cannot replace rows. Several processes may write one table.
    The table is therefore read back, and written again if another process has overwritten these rows, at most
    TABLE_ATTEMPTS times.
    """
    path = f"per_class/{set_metrics.label}.json"
    new_rows = [{"step": step, **row} for row in set_metrics.per_class]
    for _ in range(TABLE_ATTEMPTS):
        _put_rows(client, run_id, path, step, new_rows)
        if sum(row.get("step") == step for row in _table_rows(client, run_id, path)) == len(new_rows):
            break
    tag = client.get_run(run_id).data.tags.get(TABLES_TAG)
    named = parse_json(tag) if tag else []
    entry = {"path": path, "type": "table"}
    if entry not in named:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*named, entry]))


def _put_rows(client: MlflowClient, run_id: str, path: str, step: int, new_rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table with the rows of a step replaced. Its columns are the union of the columns of all rows."""
    rows = [row for row in _table_rows(client, run_id, path) if row.get("step") != step]
    rows += [dict(row) for row in new_rows]
    rows.sort(key=lambda row: row["step"])
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    client.log_text(run_id, json.dumps(table), path)


def _table_rows(client: MlflowClient, run_id: str, path: str) -> list[dict[str, Any]]:
    folder = path.rpartition("/")[0]
    if path not in {file.path for file in client.list_artifacts(run_id, folder)}:
        return []
    with ScratchFolder("table") as scratch:
        content = parse_json(Path(client.download_artifacts(run_id, path, str(scratch))).read_bytes())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def evaluation_entry(
    checkpoint: EvaluatedCheckpoint, sets: Sequence[SetMetrics], time_ms: int, replaces: bool
) -> dict[str, Any]:
    """Return an evaluation as a JSON object for the journal. `replaces`: see `Tracking.log_metrics`."""
    rows = [asdict(set_metrics) for set_metrics in sets]
    return {"evaluation": asdict(checkpoint), "sets": rows, "time_ms": time_ms, "replaces": replaces}


def parse_evaluation(entry: Mapping[str, Any]) -> tuple[EvaluatedCheckpoint, tuple[SetMetrics, ...]]:
    """Return the evaluation of a journal entry. Raises TypeError or LookupError if another version wrote the entry."""
    sets = tuple(SetMetrics(**entry_set | {"data": DataInput(**entry_set["data"])}) for entry_set in entry["sets"])
    return EvaluatedCheckpoint(**entry["evaluation"]), sets
