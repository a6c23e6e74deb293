"""Restart the driver of a run from a small parent process that supervises it (`m2f train --restart`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from m2f.cluster.exit_status import RESTARTABLE, RESTARTED_VARIABLE, ExitStatus
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_err
from m2f.cluster.train import orphans
from m2f.cluster.train.failure_policy import Attempt, AttemptHistory, Failure, Stop, decide
from m2f.cluster.train.signals import handling_signals, signal_name
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import newest_step
from m2f.trainer.checkpoint.lease import hold_lease

END_PIPE = "M2F_END_PIPE"
"""Environment variable with the descriptor of the pipe to which a driver writes before it exits deliberately."""
_POLL_S = 0.2
"""Seconds between two checks for a request to stop while no driver runs."""


def report_deliberate_exit() -> None:
    """Tell the parent process that this driver exits deliberately.

    Otherwise the parent treats exit status 1 as an outage: Ray's core calls `exit(1)` if Ray's head or raylet dies.
    """
    if number := os.environ.get(END_PIPE):
        with suppress(OSError):  # the parent process has exited
            os.write(int(number), b".")


def run_with_restarts(command: Sequence[str], config: RunConfig) -> int:
    """Run the driver of a run, restart it after failures, and return the exit status of the last driver.

    The driver restarts if a signal kills it, or if it exits because of an outage or because its machine is about to be
    preempted (see `ExitStatus`). After any other exit, it does not restart. A new driver continues from the newest
    checkpoint. Deaths and outages count against `cluster.max_failures`; every new checkpoint resets the count. An
    outage that lasts longer than the driver does not end this process.

    SIGINT and SIGTERM are passed on to the driver. On Linux, the driver gets SIGTERM if this process dies.
    """
    storage = Storage(config.storage)
    with ExitStack() as stack:
        lease = stack.enter_context(hold_lease(storage, config.run_folder, print_err))
        driver = _Driver(command, lease.environment())
        stack.enter_context(handling_signals(driver.stop))
        step = newest_step(storage, config.run_folder)
        history = AttemptHistory(step)
        while True:
            status = driver.run()
            exit_status = status if status >= 0 else 128 - status
            if driver.is_stopping or (status >= 0 and status not in RESTARTABLE):
                return exit_status
            failure = _failure(status)
            with suppress(StorageError):  # during an outage, the last known step counts
                step = newest_step(storage, config.run_folder)
            history = history.after(Attempt(failure, step))
            decision = decide(history, config.cluster.max_failures)
            print_err(f"{failure.message}: {decision.reason}")
            if isinstance(decision, Stop):
                return exit_status
            driver.wait(decision.delay_s)
            with suppress(StorageError):  # the next driver checks the lease before it writes
                lease.check()


def _failure(status: int) -> Failure:
    """Return why a driver that may be restarted has ended."""
    if status == ExitStatus.DRAINED:
        return Failure(None, "preemption", "the driver's machine is about to be preempted")
    if status == ExitStatus.OUTAGE:
        return Failure(None, "death", "the driver ended because the storage or Ray did not answer")
    return Failure(None, "death", f"the driver was killed ({signal_name(-status)})")


class _Driver:
    """The current driver process, and whether it has been asked to stop."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, os.environ | environment
        self._process: subprocess.Popen[bytes] | None = None
        self.is_stopping = False

    def run(self) -> int:
        """Run one driver process and return its exit status.

        The status is the negative signal number if a signal killed the process, and OUTAGE if Ray ended it.
        """
        if self.is_stopping:
            return -signal.SIGTERM
        reader, writer = os.pipe()
        try:
            environment = self._environment | {END_PIPE: f"{writer}"}
            # An orphaned driver would train alongside the run's next driver, so it ends with this process.
            command = [sys.executable, "-m", orphans.__name__, f"{os.getpid()}", *self._command]
            self._process = subprocess.Popen(command, env=environment, pass_fds=(writer,))
            self._environment |= {RESTARTED_VARIABLE: "1"}  # for the next process
            if self.is_stopping:  # the signal arrived while the process was starting
                self._process.send_signal(signal.SIGTERM)
            status = self._process.wait()
            os.write(writer, b"#")  # the writer stays open here and perhaps in children, so the read could block
            is_deliberate = os.read(reader, 1) == b"."
        finally:
            os.close(reader)
            os.close(writer)
        return ExitStatus.OUTAGE if status == ExitStatus.FAILED and not is_deliberate else status

    def wait(self, seconds: float) -> None:
        """Wait before the next start. Return early if a stop is requested."""
        deadline = time.monotonic() + seconds
        while not self.is_stopping and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def stop(self, number: signal.Signals) -> None:
        """Pass a signal on to the process, and prevent further starts."""
        self.is_stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
