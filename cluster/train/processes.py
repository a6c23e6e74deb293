"""Training without Ray: one process per rank on this machine, joined over loopback.

Imports neither ray, mlflow nor torch when it is imported. The workers are spawned, so that none inherits threads or a
CUDA context; each sends the error that ended it through a pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from m2f.cluster.train.orphans import end_with_parent
from m2f.model.errors import UserError
from m2f.trainer.reporting import STALL_EXIT

ECHO_S = 5.0
"""How long the other ranks may take to report what a dead one did to them, before they are ended."""
TERM_S = 10.0
CHECK_S = 1.0


class LaunchError(RuntimeError):
    """A rank failed. The message is the root cause, followed by that rank's traceback."""


@dataclass
class _Rank:
    """One worker as its parent sees it."""

    index: int
    process: BaseProcess
    pipe: Connection
    error: BaseException | None = None
    trace: str = ""

    def collect(self) -> None:
        """Read the error that the worker sent, or name the way it died."""
        if self.pipe.poll():
            with contextlib.suppress(EOFError, OSError):  # it died while it wrote
                self.error, self.trace = self.pipe.recv()
        code = self.process.exitcode
        if self.error is None and code:
            self.error = RuntimeError(f"rank {self.index} {describe_exit(code)}")


def launch(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    num_workers: int,
    environment: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run `target(*arguments)` in `num_workers` processes with torch's launch variables set; returns when all are done.

    When one fails, the others are ended. `target` and `arguments` must be picklable; `environment` is set in every
    worker besides. The first SIGINT or SIGTERM reaches the workers as SIGTERM, a second one ends them at once. `check`
    is called every second; what it raises ends the workers. They end, too, when this process does (on Linux).

    Raises:
        UserError: the root cause is a mistake that the user can correct.
        LaunchError: any other failure; names the lowest rank that is not the echo of another's failure.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    ranks: list[_Rank] = []
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe(duplex=False)
            variables = {**_launch_variables(index, num_workers, port), **(environment or {})}
            process = context.Process(target=_worker, args=(target, arguments, variables, sender), name=f"rank{index}")
            process.start()
            sender.close()
            ranks.append(_Rank(index, process, receiver))
        with _passing_signals(ranks):
            _watch(ranks, check)
    finally:
        _end(ranks)
    _raise_failure(ranks)


def describe_exit(code: int) -> str:
    """How a process ended, in words with a remedy where one is known."""
    if code == STALL_EXIT:
        return "ended itself because the run stood still (see the event above)"
    if code >= 0:
        return f"exited with status {code}"
    name = signal.Signals(-code).name
    hint = " (often the kernel's out-of-memory killer: see dmesg)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


_MOST_TEXT = 25_000  # of an error, and of its traceback: together they fit into a pipe that nobody reads yet


def _worker(
    target: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], pipe: Connection
) -> None:
    """Body of one process."""
    os.environ.update(environment)
    end_with_parent(signal.SIGKILL)  # the next holder of the lease may be training already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everyone; the parent passes on what counts
    try:
        target(*arguments)
    except BaseException as error:
        pipe.send((_portable(error), traceback.format_exc()[-_MOST_TEXT:]))
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no interpreter shutdown: it could wait for threads of a broken process group


def _portable(error: BaseException) -> BaseException:
    """The error itself where it survives pickling and is no book, else one with its words."""
    try:
        data = pickle.dumps(error)
        if len(data) <= _MOST_TEXT and isinstance(pickle.loads(data), type(error)):
            return error
    except Exception:  # whatever an error class does when it is pickled
        pass
    return RuntimeError(f"{type(error).__name__}: {error}"[:_MOST_TEXT])


def _watch(ranks: list[_Rank], check: Callable[[], None]) -> None:
    """Wait until all ranks have ended, or until one has failed and the others have had time to say what they saw."""
    running = {rank.process.sentinel: rank for rank in ranks}
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        check()
        for sentinel in wait(list(running), min(CHECK_S, deadline - time.monotonic())):
            rank = running.pop(int(sentinel))  # type: ignore[arg-type]
            rank.process.join()
            rank.collect()
            if rank.process.exitcode:
                deadline = min(deadline, time.monotonic() + ECHO_S)


def _end(ranks: list[_Rank]) -> None:
    """Leave no process behind."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join(TERM_S)
        rank.pipe.close()


def _raise_failure(ranks: list[_Rank]) -> None:
    """Raise the root cause, if any rank failed."""
    errors = {rank.index: rank.error for rank in ranks if rank.error is not None}
    if not errors:
        return
    from m2f.cluster.train.failure_policy import root_cause

    failure = root_cause(errors)
    first = failure.rank if failure.rank is not None else min(errors)
    error = errors[first]
    if isinstance(error, UserError):
        raise error
    exits = ", ".join(f"rank {r.index}: {r.process.exitcode}" for r in ranks)
    raise LaunchError(f"rank {first}: {failure.message}\n(exit codes: {exits})\n{ranks[first].trace}".rstrip())


@contextlib.contextmanager
def _passing_signals(ranks: list[_Rank]) -> Iterator[None]:
    """Pass the first SIGINT or SIGTERM on as SIGTERM; the second one ends the workers."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            _end(ranks)
            raise KeyboardInterrupt
        asked = True
        sys.stderr.write("stopping after a last checkpoint; once more to end at once\n")
        for rank in ranks:
            if rank.process.is_alive():
                rank.process.terminate()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _launch_variables(rank: int, num_workers: int, port: int) -> dict[str, str]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "LOCAL_SIZE": str(num_workers),  # DeepSpeed's device count on CPU
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", loopback),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
