"""Watchdog that ends a driver with one clear message if Ray's head or the local raylet dies.

Without it, Ray's C++ code ends the driver with status 1 and no Python error. This happens at the next message to a dead
raylet, or a minute after the death of the GCS.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import ray

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err

POLL_S = 0.5
"""Seconds between checks."""
CONNECT_S = 5.0
"""Seconds that a connection to the GCS may take."""
HEAD_PATIENCE_S = 30.0
"""Seconds for which the GCS of an external cluster may refuse connections, because its owner may restart it.

Ray itself waits 60 s.
"""
_REMEDY = (
    "the system may have killed it, for example because memory ran out. Start the command again: `m2f train` continues "
    "from the last checkpoint, and `m2f shard` keeps the written shards"
)


@contextmanager
def end_if_ray_dies(is_ours: bool) -> Iterator[None]:
    """During the block, end this process with status OUTAGE if the raylet of this machine or the GCS dies.

    If this process started the cluster (`is_ours`), the GCS may fail for only 2 * POLL_S, because nobody restarts it.
    """
    address = ray.get_runtime_context().gcs_address
    stopped = threading.Event()
    arguments = stopped.is_set, _raylet_socket(), address, 2 * POLL_S if is_ours else HEAD_PATIENCE_S
    thread = threading.Thread(target=_watch, args=arguments, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _watch(is_stopped: Callable[[], bool], raylet: str | None, gcs: str, patience_s: float) -> None:
    """Check raylet and GCS every POLL_S until `is_stopped` returns True.

    The end of the raylet closes a persistent connection. The GCS is checked with a new connection each time.
    """
    connection = None if raylet is None else _connect_local(raylet)
    last_response = time.monotonic()
    while not is_stopped():
        if connection is None:
            time.sleep(POLL_S)
        elif _is_closed(connection):
            connection.close()
            connection = _connect_local(raylet or "")
            if connection is None and not is_stopped():
                _exit_with_outage(f"Ray's raylet on this machine died: {_REMEDY}")
        if _is_listening(gcs):
            last_response = time.monotonic()
        elif time.monotonic() - last_response >= patience_s and not is_stopped():
            _exit_with_outage(f"the head of the Ray cluster died (its GCS at {gcs} accepts no connections): {_REMEDY}")
    if connection is not None:
        connection.close()


def _raylet_socket() -> str | None:
    """Return the socket path of this process's raylet, or None if it runs on another machine (`ray://`)."""
    node_id = ray.get_runtime_context().get_node_id()
    path = next((node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id), "")
    return path if os.path.exists(path) else None


def _connect_local(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(POLL_S)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def _is_closed(connection: socket.socket) -> bool:
    """Wait up to POLL_S and return whether the raylet has closed the connection. The raylet never sends data on it."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        return True
    return False


def _exit_with_outage(message: str) -> NoReturn:
    """Print the message, and end the process at once with status OUTAGE.

    A regular exit could hang, because Ray calls may block in any thread. The next start cleans up what is left behind,
    as it does after a kill.
    """
    print_err(f"m2f: {message}")
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # show the cursor, which a live view may have hidden
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(ExitStatus.OUTAGE)
