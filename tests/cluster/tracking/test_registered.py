"""Tests of locating the files of a registered model, and of the state and temporary files that this leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from m2f.cluster.tracking.registered import CHECKPOINT_FOLDER, model_folder, registry_client, using_store
from m2f.cluster.tracking.store import TrackingError, long_requests
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def separate_temporary_folder(tmp_path, monkeypatch):
    """Give each test its own temporary folder, so that fetched models of other tests are not in it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


@pytest.fixture
def store(tmp_path, migrated_database):
    """Create a database with one registered model, whose files are local. Return its URI and the model's source."""
    (tmp_path / "mlflow.db").write_bytes(migrated_database)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("models", artifact_location=(tmp_path / "files").as_uri())
    run = client.create_run(experiment)
    model = client.create_logged_model(experiment, "cells", run.info.run_id)
    package = tmp_path / "package" / CHECKPOINT_FOLDER
    package.mkdir(parents=True)
    (package / "weights.safetensors").write_bytes(b"weights")
    client.log_model_artifacts(model.model_id, str(tmp_path / "package"))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("cells")
    source = f"models:/{model.model_id}"
    with using_store(uri):  # MLflow looks up the source in the store that is set for the process
        version = client.create_model_version("cells", source, run.info.run_id, model_id=model.model_id)
    client.set_registered_model_alias("cells", "champion", version.version)
    return uri, source


def test_local_model_files_are_used_in_place(store, tmp_path):
    uri, source = store
    for address in ("models:/cells@champion", "models:/cells/1", source):
        assert model_folder(address, uri).is_relative_to(tmp_path / "files"), address
    assert not list((tmp_path / "temporary").iterdir())
    assert model_folder(source, uri, str(tmp_path / "copied")).is_relative_to(tmp_path / "copied")


@pytest.mark.parametrize("env_uri", [None, "sqlite:///other.db"])
def test_tracking_uri_of_the_process_is_restored(store, monkeypatch, env_uri):
    uri, source = store
    if env_uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", env_uri)
    before = dict(os.environ), mlflow.get_tracking_uri()
    model_folder(source, uri)
    assert (dict(os.environ), mlflow.get_tracking_uri()) == before
    with using_store(uri):
        assert mlflow.get_tracking_uri() == uri
    assert (dict(os.environ), mlflow.get_tracking_uri()) == before
    with pytest.raises(TrackingError, match=f"models:/nothing@x: cannot be read from {uri}"):
        model_folder("models:/nothing@x", uri)
    assert (dict(os.environ), mlflow.get_tracking_uri()) == before


def test_long_requests_have_ten_minutes_unless_the_user_sets_a_limit(store, monkeypatch):
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    for user, during, after in ((None, "600", "20"), ("5", "5", "5")):
        monkeypatch.delenv(variable, raising=False)
        if user is not None:
            monkeypatch.setenv(variable, user)
        registry_client(store[0])
        with long_requests():
            assert os.environ[variable] == during
        assert os.environ[variable] == after


def test_fetched_model_files_are_removed_when_the_process_ends(store, tmp_path):
    uri, source = store
    result = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("fetching_main.py"), source, uri],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    path, content = result.stdout.split()
    assert Path(path).is_relative_to(tmp_path / "temporary"), result.stderr
    assert content == "weights"
    assert not list((tmp_path / "temporary").glob("**/weights.safetensors"))
