"""Tests of local runs during outages of the S3 store and of the MLflow server."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from m2f.cluster.recipe.config import TrackingConfig
from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.commits import list_commits
from tests.cluster.tiny_run import EVERY, STEPS, small_sets, tiny_config, tracked_points, with_small_evaluation
from tests.gateway import Gateway
from tests.mlflow_server import free_port, start_server
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

LONGER = [pytest.mark.soak, pytest.mark.timeout(1800)]
SHORT_S = 4.0
"""Seconds of a short outage."""


@pytest.fixture
def config(gateway, tmp_path):
    bucket = StorageConfig(endpoint_url=gateway.url, region="us-east-1")
    place = f"s3://box/{tmp_path.name}"
    base = with_small_evaluation(tiny_config(tmp_path, "run", small_sets(f"{place}/shards", Storage(bucket))))
    return replace(
        base,
        output=f"{place}/runs",
        storage=bucket,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )


def losses(summary):
    return tracked_points(summary.tracked, "train/loss/total")


def close_at_first_commit(gateway, config, seconds=SHORT_S):
    """Close the gateway after the first commit. Open it again after `seconds` and at least one refused request."""
    wait_until(lambda: list_commits(Storage(config.storage), config.run_folder))
    gateway.closed.set()
    started_at = time.monotonic()
    wait_until(lambda: gateway.refused and time.monotonic() - started_at > seconds, patience_s=seconds + PATIENCE_S)
    gateway.closed.clear()


@pytest.mark.parametrize(
    ("seconds", "stall_timeout_s"),
    [
        pytest.param(SHORT_S, 300.0),
        pytest.param(45.0, 8.0, marks=LONGER),
        pytest.param(300.0, 8.0, marks=LONGER),
    ],
)
def test_storage_outage_within_patience_causes_no_failure_and_no_stall(
    gateway, config, baseline_run, seconds, stall_timeout_s
):
    config = replace(config, training=replace(config.training, stall_timeout_s=stall_timeout_s))
    outage = threading.Thread(target=close_at_first_commit, args=(gateway, config, seconds), daemon=True)
    outage.start()
    summary = train_locally(config)
    outage.join()
    assert summary.status == "finished"
    assert summary.failures == ()
    assert losses(summary) == baseline_run.losses
    assert [step for step, _ in losses(summary)] == list(range(1, STEPS + 1))
    assert {entry.step: entry.status for entry in summary.evaluations} == dict.fromkeys(
        range(EVERY, STEPS + 1, EVERY), "published"
    )


def test_storage_outage_beyond_patience_ends_the_run_and_a_new_start_continues_it(gateway, config):
    impatient = replace(config, storage=replace(config.storage, patience_s=1.0))
    outage = threading.Thread(target=close_at_first_commit, args=(gateway, config, 8.0), daemon=True)
    outage.start()
    with pytest.raises(OutageError, match=r"longer than storage\.patience_s \(1 s"):
        train_locally(impatient)
    outage.join()
    summary = train_locally(config)
    assert summary.status == "finished"
    assert [step for step, _ in losses(summary)] == list(range(1, STEPS + 1))


@pytest.fixture
def mlflow(migrated_database, tmp_path):
    """Start an MLflow server, and yield a gateway to it that can refuse requests."""
    (tmp_path / "server.db").write_bytes(migrated_database)
    port = free_port()
    server = start_server(tmp_path, port)
    with Gateway(f"http://127.0.0.1:{port}") as gateway:
        yield gateway
        gateway.shutdown()
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_mlflow_outage_during_training_loses_no_metrics(mlflow, tmp_path, baseline_run):
    """Training continues during the outage. At the end, the run waits until MLflow has every point exactly once."""
    base = with_small_evaluation(tiny_config(tmp_path, "run", small_sets(str(tmp_path), Storage())))
    config = replace(base, tracking=TrackingConfig(uri=mlflow.url))
    outage = threading.Thread(target=close_at_first_commit, args=(mlflow, config), daemon=True)
    outage.start()
    summary = train_locally(config)
    outage.join()
    assert summary.status == "finished"
    assert summary.failures == ()
    assert losses(summary) == baseline_run.losses
    assert all(entry.status == "published" for entry in summary.evaluations)
