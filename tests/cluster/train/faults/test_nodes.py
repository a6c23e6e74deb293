"""Tests of a cluster of four nodes on this machine, one of which is disconnected for a while.

Every node has its own network namespace, host name, /tmp and /dev/shm. Shards and checkpoints are on an S3 server, and
metrics on an MLflow server. Several nodes write the shards, and `m2f submit` starts the training.
"""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from m2f.cluster.evaluation.queue import queue_url, read_entries
from m2f.cluster.recipe.load import dump_recipe, load_recipe
from m2f.cluster.submit.upload import pack
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import list_checkpoints, read_manifest
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(2400)]

NET = "10.213.77"
HOST = f"{NET}.1"
BRIDGE = "m2f-nodes"
NODES = {"head": (2, {}), "train1": (3, {"trainer": 1}), "train2": (4, {"trainer": 1}), "eval1": (5, {"evaluator": 1})}
"""Last number of the address, and custom resources, of every node by name."""
TOKEN = "fedcba9876543210" * 4
DASHBOARD = f"http://{NET}.2:8265"


def run_command(*words: str, check: bool = True) -> str:
    result = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    assert not check or result.returncode == 0, f"{' '.join(words)}: {result.stderr}"
    return result.stdout


@contextmanager
def network():
    """Create a network bridge, and for every node a network namespace with a virtual cable to the bridge."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make network namespaces")
    if Path(sys.prefix).is_relative_to("/tmp"):
        pytest.skip(f"nodes have a /tmp of their own, in which the environment {sys.prefix} is missing")
    try:
        run_command("ip", "link", "add", BRIDGE, "type", "bridge")
    except AssertionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        run_command("ip", "address", "add", f"{HOST}/24", "dev", BRIDGE)
        run_command("ip", "link", "set", BRIDGE, "up")
        for name, (number, _) in NODES.items():
            run_command("ip", "netns", "add", f"m2f-{name}")
            run_command(
                "ip", "link", "add", f"m2f-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"m2f-{name}"
            )
            run_command("ip", "link", "set", f"m2f-{name}", "master", BRIDGE, "up")
            inside = ("ip", "netns", "exec", f"m2f-{name}", "ip")
            run_command(*inside, "address", "add", f"{NET}.{number}/24", "dev", "eth0")
            run_command(*inside, "link", "set", "eth0", "up")
            run_command(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            run_command("ip", "netns", "delete", f"m2f-{name}", check=False)
            run_command("ip", "link", "delete", f"m2f-{name}", check=False)
        run_command("ip", "link", "delete", BRIDGE, check=False)


def set_link(node: str, state: str) -> None:
    """Connect (`up`) or disconnect (`down`) a node. While it is down, packets are lost and no connection is closed."""
    run_command("ip", "link", "set", f"m2f-{node}", state)


NODE_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "HOME": "/tmp",
    # Ray detects a dead node after half a minute; its default takes a little longer.
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def node(name: str, log: Path):
    """Start a node that restarts Ray whenever it ends, as a restart policy or systemd would."""
    number, resources = NODES[name]
    ray = (
        f"{sys.executable} -m ray.scripts.scripts start --block --disable-usage-stats --node-ip-address={NET}.{number}"
    )
    if name == "head":
        ray += f" --head --port=6379 --num-cpus=0 --dashboard-host={NET}.2 --dashboard-port=8265"
    else:
        ray += f" --address={NET}.2:6379 --num-cpus=2 --resources='{json.dumps(resources)}'"
    ray += " --object-store-memory=150000000"
    script = (
        f"hostname m2f-{name} && "
        "mount -t tmpfs -o size=4g tmpfs /tmp && mount -t tmpfs -o size=1g tmpfs /dev/shm && cd /tmp && "
        f"printf '127.0.0.1 localhost\\n{NET}.{number} m2f-{name}\\n' > hosts && mount --bind hosts /etc/hosts && "
        f"while true; do {ray}; sleep 2; done"
    )
    env = os.environ | NODE_ENV | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"m2f-{name}", "unshare", "--uts", "sh", "-c", script],
            env=env,
            stdout=out,
            stderr=out,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGSTOP)  # stops the loop, which would restart Ray
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
            for pid in run_command("ip", "netns", "pids", f"m2f-{name}", check=False).split():
                os.kill(int(pid), signal.SIGKILL)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def mlflow_server(folder: Path):
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: can_connect(HOST, port), "MLflow", patience_s=300, pause_s=1)
        yield f"http://{HOST}:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def can_connect(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


RECIPE = """
name: nodes
output: s3://bucket/runs
storage: {{endpoint_url: "{s3}", patience_s: 20}}
datasets:
  train: {{shards: "s3://bucket/train", shard_mb: 0.04, source: {{kind: synthetic, num_images: 24}}}}
  val: {{shards: "s3://bucket/val", source: {{kind: synthetic, num_images: 16, seed: 1, image_id_start: 1001}}}}
data: {{train: [{{dataset: train}}], augment: {{kind: lsj, size: 64, min_scale: 0.8, max_scale: 1.2}}, workers: 0}}
model:
  backbone: {{name: resnet10t, norm: group, options: {{channels: [8, 16, 16, 32]}}}}
  pixel_decoder: {{conv_dim: 16, mask_dim: 16, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 2, hidden_dim: 16, num_heads: 2, feedforward_dim: 32}}
  loss: {{num_points: 64}}
training:
  max_steps: 100000
  global_batch: 4
  micro_batch: 2
  checkpoint: {{every_steps: 10}}
  log_every_steps: 1
  collective_timeout_s: 60
  stall_timeout_s: 30
evaluation:
  sets: [{{dataset: val}}]
  policy: latest
  shortest_edge: 64
  max_size: 96
  panels: 0
  resources_per_actor: {{evaluator: 1}}
cluster: {{num_workers: [1, 2], resources_per_worker: {{trainer: 1}}, shard_tasks: 6}}
tracking: {{uri: "{mlflow}"}}
"""


class RequestLog(logging.Handler):
    """Collects the request log of the S3 server. Each line begins with the client's address."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def requests():
    handler, logger = RequestLog(), logging.getLogger("werkzeug")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, requests):
    """Start S3 and MLflow servers and the cluster, write the shards as a Ray job, and yield the recipe's path."""
    folder = tmp_path_factory.mktemp("nodes")
    patch = pytest.MonkeyPatch()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", "test")
    with ExitStack() as stack:
        stack.callback(patch.undo)
        stack.enter_context(network())
        server = ThreadedMotoServer(ip_address=HOST, port=0)
        server.start()
        stack.callback(server.stop)
        s3 = f"http://{HOST}:{server.get_host_and_port()[1]}"
        boto3.client("s3", endpoint_url=s3, region_name="us-east-1").create_bucket(Bucket="bucket")
        tracking = stack.enter_context(mlflow_server(folder))
        for name in NODES:
            stack.enter_context(node(name, folder / f"{name}.log"))
            if name == "head":
                wait_until(lambda: can_connect(f"{NET}.2", 8265), "the dashboard", patience_s=300, pause_s=1)
        path = folder / "recipe.yaml"
        path.write_text(RECIPE.format(s3=s3, mlflow=tracking))
        command = ("python", "-m", "m2f.cluster.cli", "shard", "recipe.yaml")
        result = run_module("ray.scripts.scripts", "job", "submit", "--working-dir", make_archive(path), "--", *command)
        assert result.returncode == 0, result.stdout + result.stderr
        yield path


def make_archive(recipe: Path) -> str:
    """Pack the code and the recipe into an archive, and return its path."""
    folder = recipe.parent / "packed"
    folder.mkdir()
    return str(pack(folder, dump_recipe(load_recipe(recipe))))


def run_m2f(*words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return run_module("m2f.cluster.cli", *words, "--address", DASHBOARD, timeout=timeout)


def run_module(module: str, *words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    env = os.environ | {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": DASHBOARD}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_shards_are_written_by_several_nodes(recipe, requests, tmp_path):
    """The head, which has no CPUs, writes no shard. The shards equal those that one machine writes."""
    config = load_recipe(recipe)
    found = (re.match(rf'({NET}\.\d+) .*"PUT /bucket/train/(shards/\d+\.tar) ', line) for line in requests.lines)
    writers = {match[2]: match[1] for match in found if match}
    assert len(set(writers.values())) >= 2, writers
    assert f"{NET}.2" not in writers.values()
    dataset, remote = config.datasets["train"], Storage(config.storage)
    write_dataset(open_reader(dataset.source), replace(dataset, shards=str(tmp_path)), Storage())
    tars = sorted(tmp_path.glob("shards/*.tar"))
    assert sorted(writers) == [f"shards/{tar.name}" for tar in tars]
    for tar in tars:
        assert remote.get(f"{dataset.shards}/shards/{tar.name}") == tar.read_bytes()
    for name, address in sorted(writers.items()):
        print(f"{name} was written by {address}")  # noqa: T201


def test_doctor_checks_every_node(recipe):
    result = run_m2f("doctor", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    for number, _ in NODES.values():
        assert f"{NET}.{number}" in result.stdout


def test_run_shrinks_when_a_node_is_disconnected_and_grows_when_it_returns(recipe, requests):
    """The run continues on the remaining node, grows again, and loses no metrics and no evaluations."""
    config = load_recipe(recipe)
    storage = Storage(config.storage)

    def checkpoint_after(step: int, ranks: int):
        newest = list_checkpoints(storage, config.run_folder)[:1]
        if newest and newest[0].step > step and read_manifest(storage, newest[0].url).world_size == ranks:
            return newest[0].step
        return None

    def log_progress(message: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.1f} s  {message}\n")
        sys.stdout.flush()

    started = time.monotonic()
    submitted = run_m2f("submit", str(recipe), "--detach")
    assert submitted.returncode == 0, submitted.stderr
    step = wait_until(lambda: checkpoint_after(0, 2), "the first checkpoint of two ranks", patience_s=600, pause_s=1)
    log_progress(f"two ranks, checkpoint of step {step}; train2 is disconnected")
    set_link("train2", "down")
    step = wait_until(lambda: checkpoint_after(step + 10, 1), "a checkpoint of one rank", patience_s=600, pause_s=1)
    log_progress(f"one rank, checkpoint of step {step}; train2 is back")
    set_link("train2", "up")
    step = wait_until(lambda: checkpoint_after(step, 2), "a checkpoint of two ranks again", patience_s=600, pause_s=1)
    log_progress(f"two ranks again, checkpoint of step {step}")
    stopped = run_m2f("submit", str(recipe), "--stop")
    assert stopped.returncode == 0, stopped.stderr
    log_progress("stopped")
    log = run_module("ray.scripts.scripts", "job", "logs", stopped.stdout.split()[0]).stdout
    log_progress("\n".join(line for line in log.splitlines() if not re.match(r"step +\d+/", line)))
    assert re.search(r"resized from 2 to 1 worker in .*resized from 1 to 2 workers in ", log, re.DOTALL)
    assert "(raylet)" not in log
    last = list_checkpoints(storage, config.run_folder)[0].step + 5
    result = run_m2f("submit", str(recipe), f"training.max_steps={last}", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    log_progress(f"finished at step {last}")
    assert list_checkpoints(storage, config.run_folder)[0].step == last

    assert config.tracking.uri is not None
    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name("m2f")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    losses = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss/total")]
    assert sorted(losses) == list(range(1, last + 1)), "every step once"
    entries = read_entries(storage, queue_url(config))
    assert entries[-1].step == last
    assert all(entry.settled and entry.status != "failed" for entry in entries)
    queue = f"PUT /{queue_url(config).removeprefix('s3://')} "
    managers = {line.split()[0] for line in requests.lines if queue in line}
    assert managers == {f"{NET}.2"}, "the evaluation manager runs on the head"
