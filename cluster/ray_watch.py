"""Ends a driver with one message where a process of Ray dies without which it cannot go on.

Ray itself ends such a driver: at its next message to a dead raylet, or a minute after the death of the GCS, from C++,
with status 1 and without a word of Python.
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

LOOK_S = 0.5
CONNECT_S = 5.0
HEAD_PATIENCE_S = 30.0
"""How long the GCS of a cluster that is not ours may accept no connection: somebody may restart it. Ray waits 60 s."""
_REMEDY = (
    "the system may have killed it, for want of memory perhaps. A run goes on from its last checkpoint when it is "
    "started again"
)


@contextmanager
def watching(is_ours: bool) -> Iterator[None]:
    """During the block, end this process with status OUTAGE where the raylet of this machine or the GCS dies.

    At the GCS of a cluster that `is_ours` nobody works who could start it again, so it is not waited for.
    """
    address = ray.get_runtime_context().gcs_address
    ended = threading.Event()
    arguments = ended.is_set, _raylet_socket(), address, 2 * LOOK_S if is_ours else HEAD_PATIENCE_S
    thread = threading.Thread(target=_watch, args=arguments, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(is_over: Callable[[], bool], raylet: str | None, gcs: str, patience_s: float) -> None:
    """A raylet is watched through a connection, which ends with it; the GCS takes a new one at every look."""
    link = None if raylet is None else _connect_local(raylet)
    heard = time.monotonic()
    while not is_over():
        if link is None:
            time.sleep(LOOK_S)
        elif _has_ended(link):
            link.close()
            link = _connect_local(raylet or "")
            if link is None and not is_over():
                _end(f"Ray's raylet on this machine has died: {_REMEDY}")
        if _listens(gcs):
            heard = time.monotonic()
        elif time.monotonic() - heard >= patience_s and not is_over():
            _end(f"the head of the Ray cluster has died, its GCS at {gcs} does not listen any more: {_REMEDY}")
    if link is not None:
        link.close()


def _raylet_socket() -> str | None:
    """Of the raylet that this process talks to; None where it is not on this machine (`ray://`)."""
    mine = ray.get_runtime_context().get_node_id()
    path = next((node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == mine), "")
    return path if os.path.exists(path) else None


def _connect_local(path: str) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(LOOK_S)
    try:
        link.connect(path)
    except OSError:
        link.close()
        return None
    return link


def _has_ended(link: socket.socket) -> bool:
    """Wait LOOK_S for the end of the other side, which never says anything."""
    try:
        return link.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        return True
    return False


def _end(message: str) -> NoReturn:
    """End as if killed: calls of Ray may block in any thread, and whatever a killed driver leaves is found again."""
    print_err(f"m2f: {message}")
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a live view has hidden the cursor
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(ExitStatus.OUTAGE)
