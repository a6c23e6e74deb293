"""Tests of an MLflow server that does not respond when a run starts."""

import os
import signal
import socket
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from m2f.cluster.recipe.config import TrackingConfig
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking import retrier
from m2f.cluster.tracking.retrier import TrackingOutageError
from m2f.cluster.tracking.tracking import TrackingError, create_run
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import OutageError
from tests.gateway import Gateway, Outage
from tests.mlflow_server import free_port, start_server

RECIPE = """
name: waiting
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""


def config_at(url, folder, patience_s=600.0):
    return replace(
        parse_recipe(RECIPE),
        output=str(folder / "runs"),
        tracking=TrackingConfig(uri=url),
        storage=StorageConfig(patience_s=patience_s),
    )


def test_server_that_never_responds_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        retrier, "_FIRST_CONTACT_ENV", retrier._FIRST_CONTACT_ENV | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    )
    monkeypatch.setattr(retrier, "FIRST_CONTACT_S", 11.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "http://{}:{}".format(*listener.getsockname())
        with pytest.raises(TrackingError, match=r"cannot create or find an MLflow run.*Start the server") as caught:
            create_run(config_at(url, tmp_path))
    assert not isinstance(caught.value, OutageError)


@pytest.fixture(scope="module")
def server(migrated_database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(migrated_database)
    port = free_port()
    process = start_server(folder, port)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def gateway(server):
    with Gateway(server) as gateway:
        yield gateway
        gateway.shutdown()


@pytest.mark.slow
def test_run_is_created_once_despite_server_outages(server, gateway, tmp_path):
    lost = gateway.plan(Outage("create", lambda method, path: path.endswith("runs/create"), 2.0, loses_response=True))
    params = gateway.plan(Outage("params", lambda method, path: path.endswith("runs/log-batch"), 2.0))
    recipe = gateway.plan(Outage("recipe", lambda method, path: path.endswith("recipe.yaml"), 2.0))
    created = create_run(config_at(gateway.url, tmp_path))
    assert [outage.refused > 0 for outage in (lost, params, recipe)] == [True] * 3
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("m2f").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_id == created.run_id
    assert run.data.params["training.max_steps"] == "10"
    assert [file.path for file in client.list_artifacts(created.run_id)] == ["recipe.yaml"]


@pytest.mark.slow
def test_server_that_stops_responding_is_an_outage(gateway, tmp_path):
    gateway.plan(Outage("create", lambda method, path: path.endswith("runs/create"), 1000.0))
    with pytest.raises(TrackingOutageError, match=r"longer than storage\.patience_s \(1 s.*Start the run again"):
        create_run(config_at(gateway.url, tmp_path, patience_s=1.0))
