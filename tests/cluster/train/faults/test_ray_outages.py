"""Tests of a run on Ray with an S3 outage at each of five moments."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import psutil
import pytest
import ray

from m2f.cluster.recipe.config import TrackingConfig
from m2f.cluster.train.ray_launcher import run_training
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.commits import list_commits
from tests.cluster import tiny_run
from tests.cluster.tiny_run import EVERY, STEPS, assert_equal_files, small_sets, tiny_config, tracked_points
from tests.gateway import Outage
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]
MOMENTS = {
    "read": lambda method, path: method == "GET" and "/shards/train/" in path and ".tar" in path,
    "upload": lambda method, path: method in ("PUT", "POST") and "/disturbed/checkpoints/" in path,
    "commit": lambda method, path: method == "PUT" and "/disturbed/commits/" in path,
    # The test kills a worker, so that the supervisor looks up the newest checkpoint.
    "look-up": lambda method, path: method == "GET" and "prefix=" in path and "/disturbed/" in unquote(path),
    "evaluation": lambda method, path: method == "GET" and "/shards/val/" in path and ".tar" in path,
}


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Return the path of the gate file. Without it, workers wait after the second-to-last checkpoint.

    This leaves time for every outage before the run ends.
    """
    monkeypatch.setattr(tiny_run, "GATE", str(tmp_path / "gate"))
    monkeypatch.setattr(tiny_run, "PAUSE_S", 1.0)
    monkeypatch.setattr("m2f.cluster.train.ray_launcher.train_loop", tiny_run.slow_loop)
    ray.cloudpickle.register_pickle_by_value(tiny_run)
    yield tmp_path / "gate"
    ray.cloudpickle.unregister_pickle_by_value(tiny_run)


@pytest.fixture
def config(gateway, tmp_path, seconds, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    bucket = StorageConfig(endpoint_url=gateway.url, region="us-east-1")
    place = f"s3://box/{tmp_path.name}"
    base = tiny_config(tmp_path, "disturbed", small_sets(f"{place}/shards", Storage(bucket)))
    stall_timeout_s = 40.0 if seconds > 40.0 else base.training.stall_timeout_s  # an outage is no stall
    return replace(
        base,
        output=f"{place}/runs",
        storage=bucket,
        training=replace(base.training, stall_timeout_s=stall_timeout_s),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )


def kill_a_worker():
    """Kill a Ray Train worker of this process's cluster."""
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if words and "RayTrainWorker" in words[0]:
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no worker lives")


def run_outages(gateway, config, outages, seconds, gate, refused_requests):
    """Cause the outages one after another, and store the number of refused requests of each.

    The gate opens with the last outage.
    """
    for moment in outages:
        if moment == "look-up":
            wait_until(lambda: list_commits(Storage(config.storage), config.run_folder))
        outage = gateway.plan(Outage(moment, MOMENTS[moment], seconds))
        if moment == outages[-1]:
            gate.touch()
        if moment == "look-up":
            kill_a_worker()
        wait_until(outage.has_ended.is_set, f"the end of the outage at {moment}", patience_s=seconds + PATIENCE_S)
        refused_requests[moment] = outage.refused


LONG = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("outages", "seconds"),
    [
        pytest.param(tuple(MOMENTS), 4.0, id="4s"),
        pytest.param(tuple(MOMENTS), 45.0, marks=LONG, id="45s"),
        *(pytest.param((moment,), 300.0, marks=LONG, id=f"300s-{moment}") for moment in MOMENTS),
    ],
)
def test_storage_outages_do_not_change_results(baseline_run, gateway, config, gate, outages, seconds, tmp_path):
    refused_requests: dict[str, int] = {}
    outage_thread = threading.Thread(
        target=run_outages, args=(gateway, config, outages, seconds, gate, refused_requests), daemon=True
    )
    outage_thread.start()
    summary = run_training(config)
    outage_thread.join(PATIENCE_S)
    assert list(refused_requests) == list(outages)
    assert all(refused_requests.values()), refused_requests
    assert summary.status == "finished"
    assert len(summary.failures) == ("look-up" in outages)
    assert tracked_points(summary.tracked, "train/loss/total") == baseline_run.losses
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert [(entry.step, entry.status) for entry in summary.evaluations] == [(step, "published") for step in steps]
    assert [step for step, _ in tracked_points(summary.tracked, "val/PQ")] == steps
    assert summary.checkpoint is not None
    copy = tmp_path / "weights.safetensors"
    copy.write_bytes(Storage(config.storage).get(f"{summary.checkpoint.url}/{copy.name}"))
    assert_equal_files(copy, Path(baseline_run.run_folder, "checkpoints", f"step_{STEPS:08d}-1", copy.name))
