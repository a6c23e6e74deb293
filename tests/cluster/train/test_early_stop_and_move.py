"""Tests of early stopping, and of a run that continues after its folder was moved."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_memory

from m2f.cluster.train.local import train_locally
from m2f.cluster.train.ray_launcher import run_training
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import checkpoint_url, newest_step
from m2f.trainer.config import CheckpointConfig, EarlyStoppingConfig
from tests.cluster.tiny_run import small_sets, tiny_config, with_small_evaluation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return with_small_evaluation(tiny_config(tmp_path, "made", small_sets(str(tmp_path), Storage())))


ON_RAY = [pytest.mark.cluster, pytest.mark.soak]  # soak only: both launchers share the supervisor that decides


@pytest.mark.parametrize("train", [train_locally, pytest.param(run_training, marks=ON_RAY)])
def test_early_stopped_run_finishes_and_does_not_train_again(config, capsys, train):
    stopping = EarlyStoppingConfig(metric="val/PQ", patience=1, min_delta=100.0)
    checkpoint = CheckpointConfig(every_steps=2, keep=3)
    training = replace(config.training, max_steps=5000, checkpoint=checkpoint, early_stopping=stopping)
    config = replace(config, training=training)
    summary = train(config)
    reached = newest_step(Storage(), config.run_folder)
    assert summary.status == "finished"
    assert reached < 5000
    output = capsys.readouterr().out
    assert "step 4: early_stop: val/PQ has not risen above" in output
    published = [entry.step for entry in summary.evaluations if entry.status == "published"]
    assert published[:2] == [2, 4]
    assert published[-1] == reached  # the last checkpoint is also evaluated
    run = MlflowClient(tracking_uri=summary.tracked.uri).get_run(summary.tracked.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["event.early_stop"].startswith("step 4: val/PQ has not risen above")
    again = train(config)
    assert (again.status, newest_step(Storage(), config.run_folder)) == ("finished", reached)
    assert "starting" not in capsys.readouterr().out
    further = replace(config, training=replace(training, early_stopping=None, max_steps=reached + 1))
    assert train(further).status == "finished"
    assert newest_step(Storage(), config.run_folder) == reached + 1


def test_run_that_goes_back_to_an_older_checkpoint_ignores_the_results_after_it(config):
    stopping = EarlyStoppingConfig(metric="val/PQ", patience=2, min_delta=100.0)  # met by the results of 2, 4 and 6
    checkpoint = CheckpointConfig(every_steps=2, keep=9)
    training = replace(config.training, max_steps=6, checkpoint=checkpoint, early_stopping=stopping)
    config = replace(config, training=training)
    assert train_locally(config).status == "finished"
    for step in (4, 6):
        shutil.rmtree(checkpoint_url(config.run_folder, step, 1))
    summary = train_locally(config)
    assert newest_step(Storage(), config.run_folder) == 6
    expected = [(2, "published"), (4, "withdrawn"), (4, "published"), (6, "withdrawn"), (6, "published")]
    assert [(entry.step, entry.status) for entry in summary.evaluations] == expected


def test_run_folder_moved_to_another_output_restores_its_metrics_and_evaluations(config, tmp_path, capsys):
    first = train_locally(config)
    moved = replace(config, output=str(tmp_path / "there"), training=replace(config.training, max_steps=14))
    Path(moved.output).mkdir()
    shutil.move(config.run_folder, moved.run_folder)
    mlflow_memory._artifact_repos_cache.clear()  # another process would start with an empty cache
    summary = train_locally(moved)
    assert summary.tracked.run_id != first.tracked.run_id
    client = MlflowClient(tracking_uri=summary.tracked.uri)
    losses = client.get_metric_history(summary.tracked.run_id, "train/loss/total")
    assert sorted(point.step for point in losses) == list(range(1, 15))
    quality = client.get_metric_history(summary.tracked.run_id, "val/PQ")
    assert sorted(point.step for point in quality) == [4, 8, 12, 14]
    folders = {Path(file.path).name for file in client.list_artifacts(summary.tracked.run_id, "evaluations")}
    assert folders == {f"step_{step:08d}" for step in (4, 8, 12, 14)}
    assert Path(moved.output, "mlartifacts", summary.tracked.run_id).is_dir()
    assert not Path(config.run_folder).exists()
