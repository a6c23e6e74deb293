"""Tests that evaluated checkpoints become logged models, without duplicates after the death of a process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from urllib.parse import unquote

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from m2f.cluster.tracking.journal import Journal
from m2f.cluster.tracking.logged_models import (
    DELETED,
    KEPT,
    STATE_TAG,
    EvaluatedCheckpoint,
    KeptCheckpoints,
    SetMetrics,
)
from m2f.cluster.tracking.provenance import DataInput
from m2f.cluster.tracking.tracked_run import RunLease
from m2f.cluster.tracking.tracking import Tracking, create_run
from m2f.data_pipeline.config import StorageConfig
from tests.waiting import PATIENCE_S


@pytest.fixture
def run(stored_config):
    return create_run(stored_config)


def checkpoint(step, lease=1):
    return EvaluatedCheckpoint(
        commit=f"{step:08d}-{lease}-0123456789abcdef",
        name=f"step_{step:08d}-{lease}",
        url=f"runs/logged/checkpoints/step_{step:08d}-{lease}",
        step=step,
        run_name="v1.5",
        weights="ab" * 32,
    )


def figures(quality, folder="shards/val"):
    data = DataInput("val", "evaluation", str(folder), "f" * 64, 3, "{}")
    rows = [{"id": 1, "name": "cat", "is_thing": True, "PQ": quality}, {"id": 2, "name": "sky", "PQ": None}]
    return SetMetrics(label="val", data=data, metrics={"val/PQ": quality, "val/SQ": 80.0}, per_class=rows)


def send(run, *evaluations, writer="evaluation", kept=None, replaces=False):
    tracking = Tracking(run, writer, interval_s=0.02)
    for one, quality in evaluations:
        tracking.log_evaluation(one, [figures(quality)], replaces)
    if kept is not None:
        tracking.log_kept(kept)
    assert tracking.close(PATIENCE_S), tracking._sender.last_error


def client_of(run):
    return MlflowClient(tracking_uri=run.uri)


def models_of(run):
    experiment = client_of(run).get_run(run.run_id).info.experiment_id
    return {model.name: model for model in client_of(run).search_logged_models([experiment])}


def table_of(run):
    """Return the table of metrics per class. MLflow reads tables from the store that is set for the process."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(run.uri)
    try:
        experiment = client_of(run).get_run(run.run_id).info.experiment_id
        return client_of(run).load_table(experiment, "per_class/val.json", [run.run_id])
    finally:
        mlflow.set_tracking_uri(before)


def points(run, key):
    return sorted((point.step, point.value) for point in client_of(run).get_metric_history(run.run_id, key))


def test_evaluated_checkpoint_is_logged_as_model_with_metrics_of_its_data_set(run):
    send(run, (checkpoint(4), 40.0), (checkpoint(8), 50.0))
    models = models_of(run)
    assert set(models) == {"v1_5-step_00000004-1", "v1_5-step_00000008-1"}
    model = models["v1_5-step_00000008-1"]
    assert model.status == "READY"
    assert model.tags[STATE_TAG] == KEPT
    assert model.tags["m2f.checkpoint.url"].endswith("step_00000008-1")
    assert {(m.key, m.value, m.dataset_name, m.step) for m in model.metrics} == {
        ("val/PQ", 50.0, "val", 8),
        ("val/SQ", 80.0, "val", 8),
    }
    assert points(run, "val/PQ") == [(4, 40.0), (8, 50.0)]
    stored = client_of(run).get_run(run.run_id)
    assert {output.model_id for output in stored.outputs.model_outputs} == {m.model_id for m in models.values()}
    (data,) = stored.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("val", "f" * 36)
    experiment = [stored.info.experiment_id]
    best = client_of(run).search_logged_models(experiment, "metrics.`val/PQ` > 45", datasets=[{"dataset_name": "val"}])
    assert [found.name for found in best] == [model.name]
    described = Path(unquote(model.artifact_location.removeprefix("file://")), "MLmodel").read_text()
    assert "mlflow.model.isExternal: true" in described


def test_per_class_metrics_are_logged_as_one_table(run):
    send(run, (checkpoint(8), 50.0), (checkpoint(4), 40.0))
    send(run, (checkpoint(8), 50.0))
    client = client_of(run)
    assert json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "per_class/val.json", "type": "table"}
    ]
    table = table_of(run)
    assert table[["step", "name", "PQ"]].astype(object).where(table.notna(), None).to_numpy().tolist() == [
        [4, "cat", 40.0],
        [4, "sky", None],
        [8, "cat", 50.0],
        [8, "sky", None],
    ]


def test_table_rows_overwritten_by_another_process_are_written_again(run, monkeypatch):
    """Another process has read the table before these rows are added, and overwrites it afterwards."""
    send(run, (checkpoint(4), 40.0))
    original, others = MlflowClient.log_text, []

    def write(self, run_id, text, path):
        if path.startswith("per_class/") and not others:
            others.append(client_of(run).download_artifacts(run_id, path))
            before = Path(others[0]).read_text()
            original(self, run_id, text, path)
            return original(self, run_id, before, path)
        return original(self, run_id, text, path)

    monkeypatch.setattr(MlflowClient, "log_text", write)
    send(run, (checkpoint(8), 50.0))
    assert others
    assert sorted(table_of(run)["step"]) == [4, 4, 8, 8]


@pytest.mark.parametrize("after", range(9))
def test_process_death_at_any_call_creates_no_duplicates(run, monkeypatch, after):
    """The process dies after the store accepts a call and before the journal records it. Another one repeats all."""
    calls = ["create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs", "log_batch"]
    calls += ["log_text", "set_tag", "log_inputs", "set_logged_model_tags"]
    name, died = calls[after], []
    original = getattr(MlflowClient, name)

    def call_and_die(self, *args, **options):
        found = original(self, *args, **options)
        if not died:
            died.append(1)
            raise RuntimeError("killed")
        return found

    monkeypatch.setattr(MlflowClient, name, call_and_die)
    kept = KeptCheckpoints(names=["step_00000008-1"], newest=8)
    tracking = Tracking(run, "evaluation", interval_s=0.02)
    tracking.log_evaluation(checkpoint(4), [figures(40.0)])
    tracking.log_evaluation(checkpoint(8), [figures(50.0)])
    tracking.log_kept(kept)
    tracking.abandon() if after % 2 else tracking.close(PATIENCE_S)
    send(run, (checkpoint(4), 40.0), (checkpoint(8), 50.0), kept=kept)
    models = models_of(run)
    assert sorted(models) == ["v1_5-step_00000004-1", "v1_5-step_00000008-1"]
    assert [len(model.metrics) for model in models.values()] == [2, 2]
    assert points(run, "val/PQ") == [(4, 40.0), (8, 50.0)]
    stored = client_of(run).get_run(run.run_id)
    assert len(stored.outputs.model_outputs) == 2
    assert len(stored.inputs.dataset_inputs) == 1
    assert table_of(run)["step"].tolist() == [4, 4, 8, 8]
    assert models["v1_5-step_00000004-1"].tags[STATE_TAG] == DELETED
    assert models["v1_5-step_00000008-1"].tags[STATE_TAG] == KEPT


def test_existing_metrics_of_the_run_are_linked_to_the_model_without_duplicates(run):
    old = Tracking(run, "evaluation", interval_s=0.02)
    old.log_metrics(4, {"val/PQ": 40.0})  # as an earlier version did
    assert old.close(PATIENCE_S)
    send(run, (checkpoint(4), 40.0))
    assert points(run, "val/PQ") == [(4, 40.0)]
    (model,) = models_of(run).values()
    assert {metric.key for metric in model.metrics} == {"val/PQ", "val/SQ"}


def test_step_committed_again_is_logged_as_another_model(run):
    send(run, (checkpoint(4, lease=1), 40.0))
    send(run, (checkpoint(4, lease=2), 30.0), replaces=True, kept=KeptCheckpoints(names=["step_00000004-2"], newest=4))
    models = models_of(run)
    assert [models[f"v1_5-step_00000004-{lease}"].tags[STATE_TAG] for lease in (1, 2)] == [DELETED, KEPT]
    assert {point.value for point in models["v1_5-step_00000004-2"].metrics} == {30.0, 80.0}
    newest = max(client_of(run).get_metric_history(run.run_id, "val/PQ"), key=lambda point: point.timestamp)
    assert newest.value == 30.0


def test_outdated_list_of_kept_checkpoints_does_not_mark_later_ones_deleted(run):
    send(run, (checkpoint(4), 40.0), (checkpoint(8), 50.0), kept=KeptCheckpoints(names=["step_00000004-1"], newest=4))
    assert {model.tags[STATE_TAG] for model in models_of(run).values()} == {KEPT}


def test_unsent_evaluation_is_moved_to_the_next_evaluation_journal_only(run, stored_config):
    first = dataclasses.replace(run, lease=RunLease(stored_config.run_folder, 1, StorageConfig()))
    tracking = Tracking(first, "evaluation", interval_s=1e3)
    tracking.abandon()
    tracking.log_evaluation(checkpoint(4), [figures(40.0)])
    second = create_run(stored_config, lease=2)
    kinds = [sorted(entry) for entry, _ in Journal(second.journal("evaluation")).read(10)]
    assert kinds == [["evaluation", "replaces", "sets", "time_ms"]]
    assert all("evaluation" not in entry for entry, _ in Journal(second.journal("driver")).read(10))


def test_server_without_logged_models_receives_run_metrics(run, monkeypatch, caplog):
    monkeypatch.setattr(MlflowClient, "search_logged_models", _not_found)
    send(run, (checkpoint(4), 40.0), kept=KeptCheckpoints(names=[], newest=4))
    assert points(run, "val/PQ") == [(4, 40.0)]
    assert "does not support logged models" in caplog.text


def _not_found(*args, **options):
    error = MlflowException("API request failed with error code 404")
    error.error_code = "ENDPOINT_NOT_FOUND"
    raise error
