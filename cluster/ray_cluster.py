"""Connecting to Ray: an existing cluster by its address, else a small one of our own for as long as it is needed."""

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

from m2f.cluster.environment import OWN_CLUSTER, environment
from m2f.cluster.exit_status import RESTARTED
from m2f.cluster.ray_private import on_loopback, quiet_tokens
from m2f.cluster.ray_watch import watching
from m2f.cluster.recipe.config import ClusterConfig, RunConfig
from m2f.cluster.recipe.devices import SeenDevices, gpus_of_machine, gpus_of_nodes
from m2f.cluster.terminal import print_err
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.counted import counted
from m2f.model.errors import UserError

OBJECT_STORE_BYTES = 400_000_000
"""Of a local cluster: Ray's default of 30 % of the memory is taken from the training."""
MAX_PLACE_BYTES = 14
"""Of the folder that Ray's sockets are put below: 91 more follow, of our folder, of its session and of their names."""
CONNECT_S = 10.0
RECONNECT_S = 120.0
"""How long a driver that was started again waits for its cluster."""
_LOOK_S = 2.0
_PROBE_S = 60.0
PLENTY = 10_000.0
"""Of every custom resource, on the only node of a local cluster."""


class ClusterError(UserError):
    """A Ray cluster that cannot be reached or started. Names the address and the remedy."""


class ClusterAwayError(ClusterError, OutageError):
    """A cluster that has not come back for a driver that was started again."""


@contextmanager
def connect(config: RunConfig) -> Iterator[None]:
    """Ray for a training run with its evaluations: the recipe's cluster, or a local one with room for all of it.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    cluster, evaluation = config.cluster, config.evaluation
    num_cpus = cluster.max_workers * cluster.num_cpus_per_worker
    if evaluation.sets:
        num_cpus += evaluation.actors * evaluation.num_cpus_per_actor
    # The state API, through which Ray Train asks whether a run still lives, is part of the dashboard.
    groups = (*cluster.resources_per_worker, *evaluation.resources_per_actor)
    with local_or_existing(cluster, ceil(num_cpus), dashboard=True, resources=groups):
        yield


@contextmanager
def local_or_existing(
    cluster: ClusterConfig, num_cpus: int, dashboard: bool = False, resources: Iterable[str] = ()
) -> Iterator[None]:
    """Ray connected; a cluster that was started here has at least `num_cpus` and is stopped at the end.

    It also has plenty of the custom `resources`, by which recipes for large clusters choose their nodes.

    A process that is connected already stays so; another one ends with status OUTAGE where a process of Ray dies that
    it cannot do without. RAY_ADDRESS counts where the recipe names no address, as it is set for
    drivers that run as Ray jobs.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    print_err("starting Ray on this machine" if address is None else f"connecting to the Ray cluster at {address}")
    if address is not None:
        _reach(address, cluster)
        try:
            with watching(is_ours=False):
                yield
        finally:
            ray.shutdown()
        return
    _guard_with_token()
    with _local_environment(), on_loopback(), _private_folder() as folder:
        _start(folder, num_cpus, dashboard, resources)
        try:
            # Ray's own look-up of "the cluster of this machine" may find a neighbour's, and clean up its actors.
            address = ray.get_runtime_context().gcs_address
            with environment({"RAY_ADDRESS": address, OWN_CLUSTER: address}), watching(is_ours=True):
                yield
        finally:
            ray.shutdown()


def _reach(address: str, cluster: ClusterConfig) -> None:
    """Connect. A driver that was started again waits for the cluster, whose loss may have ended the one before."""
    is_new = RESTARTED not in os.environ
    began, told = time.monotonic(), False
    while True:
        try:
            knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            return
        except Exception as error:
            reason = f"cannot reach the Ray cluster at {address}: {_first_line(error)}"
            if is_new:
                raise ClusterError(
                    f"{reason}. Correct cluster.address (now {cluster.address!r}; RAY_ADDRESS counts where it is "
                    "null), or start the cluster"
                ) from error
            if time.monotonic() - began > RECONNECT_S:
                raise ClusterAwayError(f"{reason}. Start the run again when the cluster is back") from error
            if not told:
                print_err(f"{reason}; waiting for it up to {RECONNECT_S:.0f} s")
            told = True
        time.sleep(_LOOK_S)


def _start(folder: str, num_cpus: int, dashboard: bool, resources: Iterable[str]) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            resources=dict.fromkeys(resources, PLENTY),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=False,  # what matters comes back as results and errors; Ray's own lines would drown it
            _temp_dir=folder,
        )
    except Exception as error:
        raise ClusterError(
            f"a local Ray cluster does not start: {_first_line(error)}. Its logs are in {folder}; free some memory, or "
            "name a running cluster in cluster.address"
        ) from error


def cluster_devices(may_grow: bool) -> SeenDevices:
    """The GPUs of the connected cluster, as Ray counts them.

    Ray counts what `ray start --num-gpus` or device files say. Where all of it is this machine, torch is asked, too.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus, found = gpus_of_nodes(node["Resources"] for node in nodes), "the Ray cluster has"
    is_here = [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]
    if gpus and is_here and not gpus_of_machine() and not _sees_gpu():
        found = f"Ray counts {counted(len(gpus), 'GPU')} on {socket.gethostname()}, where torch sees"
        gpus = ()
    return SeenDevices(gpus, found=found, may_grow=may_grow)


def this_node() -> dict[str, str]:
    """Label selector of the node of this process, for actors whose place is beside it.

    Ray 2.60 does not heed a soft node affinity of actors that need no CPU: it puts them on any node.
    """
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def knock(address: str) -> None:
    """Raise OSError at once where nobody listens; Ray itself would try for minutes. Names such as `auto` pass."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _sees_gpu() -> bool:
    """Whether a task with a GPU sees it, as Ray hides all GPUs from a driver that is a job. True without an answer."""
    print_err("looking for the GPU that Ray counts here")
    try:
        return ray.get(ray.remote(num_cpus=0, num_gpus=0.001)(_is_gpu_seen).remote(), timeout=_PROBE_S)
    except ray.exceptions.RayError:  # all GPUs are in use
        return True


def _is_gpu_seen() -> bool:
    return bool(gpus_of_machine())


def _guard_with_token() -> None:
    """A secret of this process in place of the file that Ray would leave in the home folder.

    Other users of this machine reach Ray's ports, and would run code there. An explicit RAY_AUTH_MODE stands.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    quiet_tokens()


@contextmanager
def _local_environment() -> Iterator[None]:
    """What a cluster of our own and its processes inherit. What the person has set stays."""
    loopback_name = "lo0" if sys.platform == "darwin" else "lo"
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on loopback, see `on_loopback`
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 leaves ranks next to nothing beside whatever else the machine does
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback_name,
    }
    with environment({name: value for name, value in wanted.items() if name not in os.environ}):
        yield


@contextmanager
def _private_folder() -> Iterator[str]:
    """A session folder of its own, below one that only this user may enter: Ray opens its own to everybody.

    It is in /tmp where TMPDIR is too long, because the paths of Unix sockets may have 107 bytes.
    """
    temporary = tempfile.gettempdir()
    folder = ScratchFolder("ray", place=temporary if len(os.fsencode(temporary)) <= MAX_PLACE_BYTES else "/tmp")
    try:
        yield str(folder.path)
    except ClusterError:  # names the logs in the folder
        folder.keep()
        raise
    except BaseException:
        folder.remove()
        raise
    folder.remove()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
