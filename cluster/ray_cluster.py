"""Connect to Ray: to an existing cluster by its address, or to a temporary local cluster started for this process."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import ceil

import ray

from m2f.cluster.environment import OWN_CLUSTER_VARIABLE, environment
from m2f.cluster.exit_status import RESTARTED_VARIABLE
from m2f.cluster.ray_private import only_on_loopback, quiet_tokens
from m2f.cluster.ray_watch import end_if_ray_dies
from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.recipe.devices import AvailableDevices, cluster_gpus, local_gpus
from m2f.cluster.terminal import first_line, print_err
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.errors import UserError
from m2f.model.format_count import format_count
from m2f.trainer.engine.compile import find_compiler

OBJECT_STORE_BYTES = 400_000_000
"""Size of a local cluster's object store. Ray's default, 30 % of the memory, would leave too little for training."""
MAX_TEMP_FOLDER_BYTES = 14
"""Maximum length in bytes of the path of the temporary folder in which Ray creates its sockets.

The names of m2f's folder, of Ray's session and of the socket add 91 bytes.
"""
CONNECT_S = 10.0
"""Seconds that a test connection to the address of a cluster may take."""
RECONNECT_S = 120.0
"""Seconds that a restarted driver waits for its cluster."""
_RETRY_S = 2.0
"""Pause in seconds between two attempts to connect, within RECONNECT_S."""
_PROBE_S = 60.0
"""Seconds for a task with a part of a GPU, which imports torch. It never starts while all GPUs are in use."""
UNLIMITED_AMOUNT = 10_000.0
"""Amount of every custom resource on the only node of a local cluster."""


class ClusterError(UserError):
    """A Ray cluster cannot be reached or started. The message names the address and the remedy."""


class ClusterOutageError(ClusterError, OutageError):
    """The cluster of a restarted driver has not come back within RECONNECT_S."""


@contextmanager
def connect(config: RunConfig) -> Iterator[None]:
    """Connect to Ray for a training run and its evaluations.

    Without an existing cluster, a local cluster starts with enough CPUs for all workers and evaluation actors.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    cluster, evaluation = config.cluster, config.evaluation
    num_cpus = cluster.max_workers * cluster.num_cpus_per_worker
    if evaluation.sets:
        num_cpus += evaluation.actors * evaluation.num_cpus_per_actor
    # Ray Train checks through the state API whether a run is alive, and that API is part of the dashboard.
    groups = (*cluster.resources_per_worker, *evaluation.resources_per_actor)
    with existing_or_local_cluster(cluster, ceil(num_cpus), dashboard=True, resources=groups):
        yield


@contextmanager
def existing_or_local_cluster(
    cluster: ClusterConfig, num_cpus: int, dashboard: bool = False, resources: Iterable[str] = ()
) -> Iterator[None]:
    """Connect to an existing Ray cluster, or start a local one and stop it after the block.

    The address is `cluster.address`, or RAY_ADDRESS, which is set for drivers that run as Ray jobs. Without an
    address, a local cluster starts with at least `num_cpus`. It also has UNLIMITED_AMOUNT of each custom resource in
    `resources`, so that recipes which select nodes of large clusters by resource run on it too.

    A process that is already connected keeps its connection. Otherwise the process ends with status OUTAGE if Ray's
    head or the raylet of this machine dies during the block.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    print_err("starting Ray on this machine" if address is None else f"connecting to the Ray cluster at {address}")
    if address is not None:
        _connect_with_retry(address, cluster)
        try:
            with end_if_ray_dies(is_ours=False):
                yield
        finally:
            ray.shutdown()
        return
    _protect_with_token()
    with _local_environment(), only_on_loopback(), _private_folder() as folder:
        _start(folder, num_cpus, dashboard, resources)
        try:
            # Ray's lookup of "the cluster of this machine" may find another process's cluster and delete its actors.
            address = ray.get_runtime_context().gcs_address
            with environment({"RAY_ADDRESS": address, OWN_CLUSTER_VARIABLE: address}), end_if_ray_dies(is_ours=True):
                yield
        finally:
            ray.shutdown()


def _connect_with_retry(address: str, cluster: ClusterConfig) -> None:
    """Connect to the cluster. Only a restarted driver waits for it, because both may have died together."""
    is_new = RESTARTED_VARIABLE not in os.environ
    started, warned = time.monotonic(), False
    while True:
        try:
            require_listening(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            return
        except Exception as error:
            reason = f"cannot reach the Ray cluster at {address}: {first_line(error)}"
            if is_new:
                raise ClusterError(
                    f"{reason}. Correct cluster.address (now {cluster.address!r}; if it is null, RAY_ADDRESS is "
                    "used), or start the cluster"
                ) from error
            if time.monotonic() - started > RECONNECT_S:
                raise ClusterOutageError(f"{reason}. Start the run again when the cluster is back online") from error
            if not warned:
                print_err(f"{reason}; waiting up to {RECONNECT_S:.0f} s for it")
            warned = True
        time.sleep(_RETRY_S)


def _start(folder: str, num_cpus: int, dashboard: bool, resources: Iterable[str]) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            resources=dict.fromkeys(resources, UNLIMITED_AMOUNT),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=False,  # results and errors return to the driver anyway; Ray's log lines would hide them
            _temp_dir=folder,
        )
    except Exception as error:
        raise ClusterError(
            f"cannot start a local Ray cluster: {first_line(error)}. Its logs are in {folder}; free some memory, or "
            "set cluster.address to a running cluster"
        ) from error


def cluster_devices(may_grow: bool) -> AvailableDevices:
    """Return the GPUs of the connected cluster, as Ray counts them, and whether this machine has a compiler for them.

    Ray trusts `ray start --num-gpus` or device files. If this machine is the only node, no GPU is returned
    if torch sees none.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus, found = cluster_gpus(node["Resources"] for node in nodes), "the Ray cluster has"
    is_only_this_node = [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]
    if gpus and is_only_this_node and not local_gpus() and not _ray_task_sees_gpu():
        found = f"Ray reports {format_count(len(gpus), 'GPU')} on {socket.gethostname()}, where torch sees"
        gpus = ()
    return AvailableDevices(gpus, found, may_grow=may_grow, has_compiler=find_compiler("cuda") is not None)


def this_node_selector() -> dict[str, str]:
    """Return a label selector that places an actor on the node of this process.

    A soft node affinity does not work: Ray 2.60 ignores it for actors that need no CPU.
    """
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def require_listening(address: str) -> None:
    """Raise OSError if no process listens at the address; Ray itself would retry for minutes.

    Addresses without a port, such as `auto`, are not checked.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _ray_task_sees_gpu() -> bool:
    """Return whether a Ray task with a GPU sees it; True if the task cannot run in time.

    A task checks this because Ray hides all GPUs from a driver that runs as a job.
    """
    print_err("checking whether torch sees the GPU that Ray reports on this machine")
    try:
        return ray.get(ray.remote(num_cpus=0, num_gpus=0.001)(_torch_sees_gpu).remote(), timeout=_PROBE_S)
    except ray.exceptions.RayError:  # all GPUs are in use
        return True


def _torch_sees_gpu() -> bool:
    return bool(local_gpus())


def _protect_with_token() -> None:
    """Protect a local cluster with a random token in the environment, so that Ray writes no token file to $HOME.

    Without a token, other users of this machine could run code through Ray's ports. An explicit RAY_AUTH_MODE is kept.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    quiet_tokens()


@contextmanager
def _local_environment() -> Iterator[None]:
    """Set environment variables for a local cluster and its processes. Variables that the user has set are kept."""
    loopback_name = "lo0" if sys.platform == "darwin" else "lo"
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds all ports to loopback, see `only_on_loopback`
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # with Ray's niceness of 15, ranks get almost no CPU time when other processes run
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback_name,
    }
    with environment({name: value for name, value in variables.items() if name not in os.environ}):
        yield


@contextmanager
def _private_folder() -> Iterator[str]:
    """Create a folder for Ray's session that only this user may enter; Ray's own folders are readable to everybody.

    It is in /tmp if the path of the temporary folder is longer than MAX_TEMP_FOLDER_BYTES, because paths of Unix
    sockets have at most 107 bytes.
    """
    temporary = tempfile.gettempdir()
    folder = ScratchFolder("ray", parent=temporary if len(os.fsencode(temporary)) <= MAX_TEMP_FOLDER_BYTES else "/tmp")
    try:
        yield str(folder.path)
    except ClusterError:  # the error message refers to the logs in this folder
        folder.keep()
        raise
    except BaseException:
        folder.remove()
        raise
    folder.remove()
