"""Several machines in one: every node has its own network, name, /tmp and /dev/shm, and one of them is cut off.

Shards and checkpoints lie on an S3 server, metrics on a real MLflow server, and everything goes through `m2f submit`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from cluster.eval_queue import read_entries
from cluster.eval_service import queue_url
from cluster.recipe import load_recipe
from data_pipeline.config import DatasetConfig, StorageConfig, SyntheticSource
from data_pipeline.readers import open_reader
from data_pipeline.shards import write_dataset
from data_pipeline.storage import Storage
from trainer.checkpoint_folder import list_checkpoints, read_manifest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(2400)]

NET = "10.213.77"
HOST = f"{NET}.1"
BRIDGE = "m2f-nodes"
NODES = {"head": (2, {}), "train1": (3, {"trainer": 1}), "train2": (4, {"trainer": 1}), "eval1": (5, {"evaluator": 1})}
"""Name: last number of the address, and custom resources."""
TOKEN = "fedcba9876543210" * 4
DASHBOARD = f"http://{NET}.2:8265"


def sh(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@contextmanager
def network():
    """A switch in the middle and a namespace with one cable for each node."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make network namespaces")
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
    except AssertionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        sh("ip", "address", "add", f"{HOST}/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for name, (number, _) in NODES.items():
            sh("ip", "netns", "add", f"m2f-{name}")
            sh("ip", "link", "add", f"m2f-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"m2f-{name}")
            sh("ip", "link", "set", f"m2f-{name}", "master", BRIDGE, "up")
            inside = ("ip", "netns", "exec", f"m2f-{name}", "ip")
            sh(*inside, "address", "add", f"{NET}.{number}/24", "dev", "eth0")
            sh(*inside, "link", "set", "eth0", "up")
            sh(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            sh("ip", "netns", "delete", f"m2f-{name}", check=False)
            sh("ip", "link", "delete", f"m2f-{name}", check=False)
        sh("ip", "link", "delete", BRIDGE, check=False)


def cable(node: str, state: str) -> None:
    """Plug in (`up`) or pull (`down`): packets vanish, no connection is closed."""
    sh("ip", "link", "set", f"m2f-{node}", state)


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
    # a dead node is noticed after half a minute; Ray's default takes a little longer
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def node(name: str, log: Path):
    """A machine that keeps Ray running, as a restart policy or systemd would. Yields when it was started."""
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
            process.send_signal(signal.SIGSTOP)  # the loop shall not start another one
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
            for pid in sh("ip", "netns", "pids", f"m2f-{name}", check=False).split():
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
        wait_for(lambda: can_connect(HOST, port), 300, "MLflow")
        yield f"http://{HOST}:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def can_connect(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def wait_for(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what}: waited {seconds:.0f} s"
        time.sleep(1)
    return result


RECIPE = """
name: nodes
output: s3://bucket/runs
storage: {{endpoint_url: "{s3}"}}
datasets:
  train: {{shards: "s3://bucket/train"}}
  val: {{shards: "s3://bucket/val"}}
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
evaluation:
  sets: [{{dataset: val}}]
  policy: latest
  shortest_edge: 64
  max_size: 96
  panels: 0
  resources_per_actor: {{evaluator: 1}}
cluster: {{num_workers: {workers}, resources_per_worker: {{trainer: 1}}}}
tracking: {{uri: "{mlflow}"}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe for a cluster of four nodes, which runs, with a store and a tracking server beside it."""
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
        storage = Storage(StorageConfig(endpoint_url=s3))
        for name, seed in (("train", 0), ("val", 1)):
            source = SyntheticSource(num_images=16, seed=seed, image_id_start=1 + 1000 * seed)
            dataset = DatasetConfig(shards=f"s3://bucket/{name}", source=source)
            write_dataset(open_reader(source), dataset, storage)
        tracking = stack.enter_context(mlflow_server(folder))
        for name in NODES:
            stack.enter_context(node(name, folder / f"{name}.log"))
            if name == "head":
                wait_for(lambda: can_connect(f"{NET}.2", 8265), 300, "the dashboard")
        (folder / "recipe.yaml").write_text(RECIPE.format(s3=s3, mlflow=tracking, workers="[1, 2]"))
        yield folder / "recipe.yaml"


def m2f(*words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    env = os.environ | {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-m", "cluster.cli", *words, "--address", DASHBOARD]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_the_doctor_visits_every_node(recipe):
    done = m2f("doctor", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    for number, _ in NODES.values():
        assert f"{NET}.{number}" in done.stdout


def test_a_node_is_cut_off_and_comes_back(recipe):
    """The run shrinks to the node that is left, goes on, grows again, and loses nothing."""
    config = load_recipe(recipe)
    storage = Storage(config.storage)

    def checkpoint_after(step: int, ranks: int):
        newest = list_checkpoints(storage, config.run_folder)[:1]
        if newest and newest[0].step > step and read_manifest(storage, newest[0].url).world_size == ranks:
            return newest[0].step
        return None

    def say(what: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.1f} s  {what}\n")
        sys.stdout.flush()

    started = time.monotonic()
    sent = m2f("submit", str(recipe), "--detach")
    assert sent.returncode == 0, sent.stderr
    step = wait_for(lambda: checkpoint_after(0, 2), 600, "the first checkpoint of two ranks")
    say(f"two ranks, checkpoint of step {step}; train2 is cut off")
    cable("train2", "down")
    step = wait_for(lambda: checkpoint_after(step + 10, 1), 600, "a checkpoint of one rank")
    say(f"one rank, checkpoint of step {step}; train2 is back")
    cable("train2", "up")
    step = wait_for(lambda: checkpoint_after(step, 2), 600, "a checkpoint of two ranks again")
    say(f"two ranks again, checkpoint of step {step}")
    stopped = m2f("submit", str(recipe), "--stop")
    assert stopped.returncode == 0, stopped.stderr
    say("stopped")
    last = list_checkpoints(storage, config.run_folder)[0].step + 5
    done = m2f("submit", str(recipe), f"training.max_steps={last}", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    say(f"finished at step {last}")
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
