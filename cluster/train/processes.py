"""Run one process per rank on this machine; the ranks communicate over loopback.

This module imports none of ray, mlflow and torch. The processes are spawned, so that they inherit no threads
and no CUDA context. Each process has a pipe to its parent for messages and for the error that ended it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

from m2f.cluster.exit_status import end_process
from m2f.cluster.train.failure_policy import root_cause
from m2f.cluster.train.orphans import end_with_parent
from m2f.cluster.train.signals import signal_name
from m2f.trainer.errors import RankDiedError
from m2f.trainer.reporting import STALL_EXIT

GRACE_S = 5.0
"""Seconds after the failure of a rank in which the other ranks can report their errors before they are killed."""
KILL_TIMEOUT_S = 10.0
"""Seconds to wait for a killed process to end."""
POST_TIMEOUT_S = 2.0
"""Maximum seconds that a message waits while another thread sends one, so a stalled rank can still end itself."""
_SPAWN_CONTEXT = multiprocessing.get_context("spawn")  # a rank inherits neither threads nor a CUDA context
_MAX_ERROR_CHARS = 25_000
"""Maximum characters of an error, and of its traceback. Together they fit into the buffer of an unread pipe."""

Post = Callable[[Any], None]
"""Function that sends a message to the parent process."""


@dataclass(frozen=True)
class RankError:
    """The error that ended a rank."""

    error: BaseException
    trace: str
    """Traceback from the rank's process; empty if the process died without one."""


@dataclass
class _Rank:
    """The parent's view of one process."""

    index: int
    process: BaseProcess
    pipe: Connection
    error: RankError | None = None
    messages: list[Any] = field(default_factory=list)
    is_open: bool = True
    """Whether the pipe can still deliver messages."""

    def collect(self) -> None:
        """Read all messages that the process has sent."""
        try:
            while self.is_open and self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, RankError):
                    self.error = message
                else:
                    self.messages.append(message)
        except (EOFError, OSError):  # the process has ended, perhaps in the middle of a message
            self.is_open = False

    def record_exit(self) -> None:
        """Record the end of the process: if it sent no error, derive one from a nonzero exit code."""
        self.process.join()
        self.collect()
        code = self.process.exitcode
        if self.error is None and code:
            self.error = RankError(RankDiedError(f"rank {self.index} {describe_exit(code)}"), "")


class RankProcesses:
    """Context manager for processes that run `target(*arguments, post)` with torch's launch variables set.

    `target` and `arguments` must be picklable. `environment` is added to the environment of every process. After a
    rank has failed, the others have `GRACE_S` seconds to end before they are killed. On Linux, the processes are also
    killed if this process dies.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        num_workers: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._target, self._arguments, self._num_workers = target, arguments, num_workers
        self._environment = environment or {}
        self._ranks: list[_Rank] = []
        self._running: dict[int, _Rank] = {}
        self._deadline = float("inf")

    def __enter__(self) -> Self:
        port = _free_port()
        try:
            for index in range(self._num_workers):
                receiver, sender = _SPAWN_CONTEXT.Pipe(duplex=False)
                variables = {**_launch_variables(index, self._num_workers, port), **self._environment}
                arguments = (self._target, self._arguments, variables, sender, os.getpid())
                process = _SPAWN_CONTEXT.Process(target=_worker, args=arguments, name=f"rank{index}")
                process.start()
                sender.close()
                rank = _Rank(index, process, receiver)
                self._ranks.append(rank)
                self._running[process.sentinel] = rank  # so that `close` kills it if a later rank cannot start
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether any process is running."""
        return bool(self._running)

    @property
    def errors(self) -> dict[int, RankError]:
        """Errors of failed ranks, by rank. The errors are complete once no process is running."""
        return {rank.index: rank.error for rank in self._ranks if rank.error is not None}

    def first_error(self) -> tuple[BaseException, str] | None:
        """Return the error that caused those of other ranks, and a report with its traceback; None if no rank failed.

        The report names the lowest rank whose failure is not a consequence of another rank's, and all exit statuses.
        """
        errors = self.errors
        if not errors:
            return None
        failure = root_cause({rank: found.error for rank, found in errors.items()})
        rank = min(errors) if failure.rank is None else failure.rank
        exit_codes = ", ".join(f"rank {rank.index}: {rank.process.exitcode}" for rank in self._ranks)
        report = f"rank {rank}: {failure.message}\n(exit codes: {exit_codes})\n{errors[rank].trace}"
        return errors[rank].error, report.rstrip()

    def receive(self, wait_s: float) -> list[Any]:
        """Wait up to `wait_s` seconds for a message and return the messages of all ranks.

        Returns earlier if all ranks have ended. The remaining ranks are killed once `GRACE_S` seconds have passed since
        a failure.
        """
        until = min(time.monotonic() + wait_s, self._deadline)
        while self._running:
            # Closed pipes are skipped, because they are always ready; a rank closes its pipe shortly before it ends.
            pipes = [rank.pipe for rank in self._running.values() if rank.is_open]
            for ready in wait([*self._running, *pipes], max(0.0, until - time.monotonic())):
                if isinstance(ready, int):
                    self._record_exit(self._running.pop(ready))
            for rank in self._running.values():
                rank.collect()
            if time.monotonic() >= until or any(rank.messages for rank in self._ranks):
                break
        if time.monotonic() >= self._deadline:
            self._kill()
        messages = [message for rank in self._ranks for message in rank.messages]
        for rank in self._ranks:
            rank.messages.clear()
        return messages

    def ask_to_stop(self) -> None:
        """Send SIGTERM to every rank."""
        for rank in self._running.values():
            rank.process.terminate()

    def close(self) -> None:
        """Kill all running processes and close the pipes."""
        self._kill()
        for rank in self._ranks:
            rank.pipe.close()

    def _record_exit(self, rank: _Rank) -> None:
        rank.record_exit()
        if rank.process.exitcode:
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)

    def _kill(self) -> None:
        for rank in self._running.values():
            rank.process.kill()
        for rank in self._running.values():
            rank.process.join(KILL_TIMEOUT_S)
            rank.collect()
        self._running = {}


def describe_exit(code: int) -> str:
    """Describe how a process ended, with a remedy if one is known. A negative `code` is the number of a signal."""
    if code == STALL_EXIT:
        return "exited because training stalled (see the event above)"
    if code >= 0:
        return f"exited with status {code}"
    name = signal_name(-code)
    hint = " (often the kernel's out-of-memory killer: see dmesg)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _worker(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    pipe: Connection,
    parent: int,
) -> None:
    """Run the target in its new process, and send its error to the parent if it fails."""
    os.environ.update(environment)
    end_with_parent(signal.SIGKILL, parent)  # an orphaned rank could write alongside the next holder of the lease
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends SIGINT to all processes, but the parent decides
    lock = threading.Lock()

    def post(message: Any) -> None:
        locked = lock.acquire(timeout=POST_TIMEOUT_S)
        try:
            pipe.send(message)
        finally:
            if locked:
                lock.release()

    try:
        target(*arguments, post)
    except BaseException as error:
        post(RankError(_picklable_error(error), traceback.format_exc()[-_MAX_ERROR_CHARS:]))
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # skips the interpreter's shutdown, which could wait for threads of a broken process group
    end_process(0)


def _picklable_error(error: BaseException) -> BaseException:
    """Return the error if it can be pickled and is small; otherwise a RuntimeError with its type and message."""
    try:
        data = pickle.dumps(error)
        if len(data) <= _MAX_ERROR_CHARS and isinstance(pickle.loads(data), type(error)):
            return error
    except Exception:  # pickling an arbitrary error can raise anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS])


def _launch_variables(rank: int, num_workers: int, port: int) -> dict[str, str]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "LOCAL_SIZE": str(num_workers),  # the device count that DeepSpeed uses on CPUs
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", loopback),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
