"""Tests of the tags with which MLflow's UI presents a run, and of parent runs."""

import dataclasses
import shutil

import mlflow
import pytest
from mlflow import MlflowClient

from m2f.cluster.tracking.presentation import EXPERIMENT_KIND, MODEL_TRAINING, PARENT_TAG
from m2f.cluster.tracking.tracking import TrackingError, create_run


def with_name_and_parent(config, name, parent):
    return dataclasses.replace(config, name=name, tracking=dataclasses.replace(config.tracking, parent=parent))


def tags(run):
    return MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.tags


def test_run_has_tags_for_user_command_and_description(stored_config, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("sys.argv", ["/usr/bin/m2f", "train", "a b.yaml", "tracking.uri=http://me:secret@host"])
    run = create_run(stored_config)
    found = tags(run)
    assert found["mlflow.user"] == "ada"
    assert found["mlflow.source.name"] == "m2f train 'a b.yaml' tracking.uri=http://host"
    assert found["mlflow.source.type"] == "LOCAL"
    assert f"`{stored_config.run_folder}`" in found["mlflow.note.content"]
    client = MlflowClient(tracking_uri=run.uri)
    experiment = client.get_experiment_by_name("m2f")
    assert experiment.tags[EXPERIMENT_KIND] == MODEL_TRAINING
    client.set_experiment_tag(experiment.experiment_id, EXPERIMENT_KIND, "chosen by a person")
    create_run(dataclasses.replace(stored_config, name="second"))
    assert client.get_experiment_by_name("m2f").tags[EXPERIMENT_KIND] == "chosen by a person"


@pytest.mark.parametrize("name", ["seeds 'of' today", 'today\'s "seeds"'])
def test_runs_with_the_same_parent_name_share_one_parent_run(stored_config, name):
    first, second = (create_run(with_name_and_parent(stored_config, run, name)) for run in ("a", "b"))
    parent = tags(first)[PARENT_TAG]
    assert tags(second)[PARENT_TAG] == parent
    client = MlflowClient(tracking_uri=first.uri)
    assert client.get_run(parent).info.run_name == name
    assert client.get_run(parent).info.status == "FINISHED"
    assert tags(create_run(with_name_and_parent(stored_config, "c", first.run_id)))[PARENT_TAG] == first.run_id
    with pytest.raises(TrackingError, match=r"tracking\.parent is 0{32}, but"):
        create_run(with_name_and_parent(stored_config, "d", "0" * 32))


def test_active_mlflow_run_becomes_the_parent(stored_config):
    run = create_run(stored_config)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(run.uri)
    try:
        with mlflow.start_run(experiment_id=MlflowClient().get_experiment_by_name("m2f").experiment_id) as opened:
            inner = create_run(dataclasses.replace(stored_config, name="inner"))
    finally:
        mlflow.set_tracking_uri(before)
    assert tags(inner)[PARENT_TAG] == opened.info.run_id
    assert PARENT_TAG not in tags(create_run(dataclasses.replace(stored_config, name="alone")))


def test_warning_says_why_the_active_mlflow_run_is_not_the_parent(stored_config, tmp_path, caplog):
    store = f"sqlite:///{tmp_path}/runs/mlflow.db"
    other_store = f"sqlite:///{shutil.copy(tmp_path / 'runs/mlflow.db', tmp_path)}"
    tracking = dataclasses.replace(stored_config.tracking, uri=store)  # `set_tracking_uri` sets the default
    children = []
    before = mlflow.get_tracking_uri()
    try:
        for name, uri in (("first", store), ("second", other_store)):
            mlflow.set_tracking_uri(uri)
            with mlflow.start_run(experiment_id="0", run_name="outer"):
                children.append(create_run(dataclasses.replace(stored_config, name=name, tracking=tracking)))
    finally:
        mlflow.set_tracking_uri(before)
    assert all(PARENT_TAG not in tags(child) for child in children)
    experiment, elsewhere = (record.getMessage() for record in caplog.records if "parent" in record.getMessage())
    assert "the open MLflow run outer does not become the parent of this run" in experiment
    assert "in the experiment 'Default'; set tracking.experiment to 'Default'" in experiment
    assert f"in the store {other_store}; set tracking.uri" in elsewhere
