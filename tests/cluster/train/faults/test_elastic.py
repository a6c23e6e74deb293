"""Tests of elastic training, with a run on a Ray cluster that loses a node and gets another.

The nodes are raylets on this machine.
"""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.tracking.tracking import create_run
from m2f.cluster.train.elastic import WorkerScaler, next_size
from m2f.cluster.train.local import train_locally
from m2f.cluster.train.ray_launcher import run_training
from m2f.cluster.train.resources import count_fitting
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.commits import list_commits
from m2f.trainer.checkpoint.folder import newest_step
from m2f.trainer.config import CheckpointConfig
from tests.cluster import tiny_run
from tests.cluster.tiny_run import small_sets, tiny_config
from tests.waiting import PATIENCE_S

STEPS, EVERY = 26, 3
RANGE = ClusterConfig(num_workers=(1, 3), num_cpus_per_worker=2)


def test_count_fitting_counts_whole_workers_per_node():
    nodes = [{"CPU": 3.0, "trainer": 1.0}, {"CPU": 4.0}, {"CPU": 0.1 + 0.2}]
    assert count_fitting(nodes, {"CPU": 1.0}) == 7
    assert count_fitting(nodes, {"CPU": 2.0}) == 3
    assert count_fitting(nodes, {"CPU": 1.0, "trainer": 1.0}) == 1
    assert count_fitting([{"CPU": 0.3}], {"CPU": 0.1}) == 3
    assert count_fitting([{"CPU": 0.0}], {}) > 1000
    assert count_fitting([], {}) == 0


def test_fewer_than_max_workers_start_only_after_patience():
    assert next_size(5, RANGE, 0.0) == 3
    assert next_size(2, RANGE, 1.0) is None
    assert next_size(2, RANGE, 10.0) == 2
    assert next_size(0, RANGE, 1000.0) is None
    assert WorkerScaler(ClusterConfig(num_workers=3), list).next() == 3  # a fixed number: Ray waits for resources


def test_worker_range_must_be_ascending():
    with pytest.raises(ConfigError, match=r"cluster\.num_workers is \[3, 2\]"):
        ClusterConfig(num_workers=(3, 2))
    assert (ClusterConfig(num_workers=2).min_workers, ClusterConfig(num_workers=2).max_workers) == (2, 2)


class Relay:
    """Stub of RunRelay with the attributes that `WorkerScaler` reads."""

    resumed = None
    last_step = 0


def test_run_grows_only_after_lasting_free_resources_and_training_progress():
    now, nodes, relay = [0.0], [{"CPU": 2.0}], Relay()
    scaler = WorkerScaler(RANGE, lambda: nodes, lambda: now[0])
    assert scaler.next() is None
    now[0] = 10.0
    assert scaler.next() == 1
    for _ in range(20):
        now[0] += 3.0
        scaler.check_growth(relay)
    assert not scaler.growing  # no step is done yet
    relay.last_step = 1
    for free, grows in ((2.0, False), (2.0, False), (1.0, False), (2.0, False), (2.0, False), (2.0, False)):
        nodes[0] = {"CPU": free}
        now[0] += 4.0
        scaler.check_growth(relay)
        assert scaler.growing == grows
    now[0] += 4.0
    scaler.check_growth(relay)
    assert scaler.growing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "resources": {"evaluator": 1},
            "include_dashboard": False,
            "object_store_memory": 80_000_000,
        },
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(tiny_run)  # workers cannot import it
    yield cluster
    ray.cloudpickle.unregister_pickle_by_value(tiny_run)
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


def history(run, metric):
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, metric)
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


@pytest.mark.timeout(1200)
@pytest.mark.cluster
@pytest.mark.slow
def test_run_shrinks_and_grows_with_its_cluster(cluster, folder, monkeypatch):
    """The run goes from 2 workers to 1 and back to 2. The raylet of rank 0 is killed right after a commit.

    The losses match those of a run that keeps 2 workers. No metric and no evaluation is missing or duplicated.
    """
    monkeypatch.setattr("m2f.cluster.train.elastic.PATIENCE_S", 2.0)
    monkeypatch.setattr("m2f.cluster.train.elastic.CHECK_INTERVAL_S", 0.5)
    monkeypatch.setattr("m2f.cluster.train.supervisor.POLL_S", 0.2)
    monkeypatch.setattr("m2f.cluster.train.ray_launcher.train_loop", tiny_run.slow_loop)
    config = tiny_config(folder, "elastic", small_sets(str(folder), Storage()))
    training = replace(config.training, max_steps=STEPS, checkpoint=CheckpointConfig(every_steps=EVERY, keep=2))
    on_head = replace(config.evaluation, num_cpus_per_actor=0.0, resources_per_actor={"evaluator": 1})
    config = replace(config, training=training, evaluation=on_head, cluster=ClusterConfig(num_workers=(1, 2)))
    nodes = [add_node(cluster), add_node(cluster)]
    outcome = []
    run = threading.Thread(target=lambda: outcome.append(run_training(config)), daemon=True)
    run.start()

    def wait_past(step):
        while newest_step(Storage(), config.run_folder) <= step:
            assert run.is_alive()
            time.sleep(0.05)

    wait_past(0)
    first = Path(config.run_folder, "node_of_rank_0").read_text()
    cluster.remove_node(next(node for node in nodes if node.node_id == first), allow_graceful=False)
    wait_past(newest_step(Storage(), config.run_folder))
    add_node(cluster)
    run.join(PATIENCE_S)
    (summary,) = outcome
    assert summary.status == "finished"
    assert [(resize.before, resize.after) for resize in summary.resizes] == [(2, 1), (1, 2)]
    assert summary.resizes[1].steps_redone == 0  # the run writes a checkpoint before it grows
    assert summary.resizes[0].steps_redone <= EVERY + 2
    baseline = replace(config, name="baseline", cluster=ClusterConfig(num_workers=2), evaluation=EvaluationConfig())
    train_locally(baseline)
    losses = history(summary.tracked, "train/loss/total")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(history(create_run(baseline), "train/loss/total"), rel=1e-6)
    committed = {commit.checkpoint.step for commit in list_commits(Storage(), config.run_folder)}
    assert committed >= {*range(EVERY, STEPS, EVERY), STEPS}
    assert {entry.step for entry in summary.evaluations if entry.status == "published"} == committed
    assert set(history(summary.tracked, "val/PQ")) == committed
