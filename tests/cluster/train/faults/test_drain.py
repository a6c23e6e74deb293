"""Test of a run on a Ray cluster whose nodes are preempted. It also reads the metrics that Ray exports."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
import ray
from ray.cluster_utils import Cluster

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.sharding.job import run_shard_job
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import list_checkpoints, newest_step
from tests.ray_private import announce_preemption
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

RECIPE = """
name: drained
datasets: {{train: {{shards: {folder}/shards, source: {{kind: synthetic, num_images: 24}}}}}}
output: {folder}/runs
data:
  train: [{{dataset: train}}]
  augment: {{kind: lsj, size: 64, min_scale: 0.8, max_scale: 1.2}}
  workers: 0
model:
  backbone: {{name: resnet10t, norm: group, options: {{channels: [8, 16, 16, 32]}}}}
  pixel_decoder: {{conv_dim: 16, mask_dim: 16, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 1, hidden_dim: 16, num_heads: 2, feedforward_dim: 32}}
  loss: {{num_points: 64}}
training:
  max_steps: 100000
  global_batch: 4
  micro_batch: 2
  log_every_steps: 1
  collective_timeout_s: 60
  checkpoint: {{every_steps: 1000}}
cluster: {{num_workers: 2}}
"""
STORE = 80_000_000
NOTICE_S = 20.0
"""Seconds between the notice and the preemption of a node."""


@pytest.fixture
def nodes(monkeypatch):
    """Start a cluster with a head without CPUs and one node for two workers. Yield the cluster and the node."""
    for name, value in {"PREEMPTION_POLL_INTERVAL_S": "0.5", "HEALTH_CHECK_INTERVAL_S": "0.5"}.items():
        monkeypatch.setenv(f"RAY_TRAIN_{name}", value)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()


def traced_steps(folder, rank=0):
    """Return the steps of every attempt, in the order of their execution."""
    files = sorted(folder.glob(f"runs/drained/traces/*/rank_{rank:04d}.jsonl"))
    return [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]


def scrape():
    """Return the m2f metrics of all live nodes: (name, rank) -> value."""
    samples = {}
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                lines = response.read().decode().splitlines()
            for line in lines:
                if found := re.match(r"ray_(m2f_\w+)\{(.*)\} (\S+)", line):
                    rank = re.search(r'rank="(\d+)"', found[2])
                    samples[found[1], rank and rank[1]] = float(found[3])
    return samples


@pytest.fixture
def driver(nodes, tmp_path):
    """Start `m2f train` on the head, with a run too long to finish. Its output is in `driver.log`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    config = load_recipe(str(recipe), [])
    run_shard_job("train", config.datasets["train"], config.cluster, Storage())
    command = [sys.executable, "-m", "m2f.cluster.cli", "train", str(recipe), "--plain"]
    with (tmp_path / "driver.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    yield config, process
    if process.poll() is None:
        process.kill()
        process.wait()


def announce_end(cluster, *nodes):
    """Announce the preemption of the nodes, and return its time in Unix seconds."""
    deadline = time.time() + NOTICE_S
    for node in nodes:
        assert announce_preemption(cluster.address, node.node_id, deadline)
    return deadline


def test_preempted_worker_node_repeats_at_most_one_step_and_preempted_driver_node_drains_run(nodes, driver, tmp_path):
    cluster, node = nodes
    config, process = driver
    output = (tmp_path / "driver.log").read_text
    wait_until(lambda: (steps := traced_steps(tmp_path)) and len(steps[0]) > 3, output)
    expected_samples = {("m2f_rank_step_seconds", "0"), ("m2f_rank_step_seconds", "1"), ("m2f_images_per_second", None)}
    found = wait_until(lambda: (samples := scrape()) and expected_samples <= samples.keys() and samples, output)
    assert found["m2f_rank_step_seconds", "0"] > 0
    assert found["m2f_rank_process_bytes", "1"] > 1e8
    assert found["m2f_images_per_second", None] > 0
    assert found["m2f_ranks", None] == 2

    deadline = announce_end(cluster, node)
    saved = wait_until(lambda: list_checkpoints(Storage(), config.run_folder), output)
    wait_until(lambda: time.time() > deadline)  # Ray does not count a node that dies earlier as preempted
    cluster.remove_node(node, allow_graceful=False)
    other = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    wait_until(lambda: len(steps := traced_steps(tmp_path)) > 1 and len(steps[1]) > 3, output)
    announce_end(cluster, cluster.head_node, other)
    assert process.wait(PATIENCE_S) == ExitStatus.DRAINED, output()

    before, after = traced_steps(tmp_path)
    assert before == list(range(1, before[-1] + 1))
    assert saved[0].step == before[-1]
    assert after == list(range(after[0], after[-1] + 1))
    assert before[-1] - after[0] + 1 <= 1  # repeated steps
    assert newest_step(Storage(), config.run_folder) == after[-1]
    assert "restarting in 0 s: the node was preempted" in output()
    assert "run drained: " in output()
