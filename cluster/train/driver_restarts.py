"""A driver that starts again where something ends it: a small process stays behind and watches it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from m2f.cluster.exit_status import RESTARTABLE, RESTARTED, ExitStatus
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_err
from m2f.cluster.train.failure_policy import Attempt, AttemptHistory, Failure, Stop, decide
from m2f.cluster.train.orphans import end_with_parent
from m2f.cluster.train.signals import handling
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import newest_step
from m2f.trainer.checkpoint.lease import hold_lease

END_PIPE = "M2F_END_PIPE"
"""Environment variable with the number of the pipe in which a driver says that it ends of its own accord."""
_LOOK_S = 0.2


def note_end() -> None:
    """A driver has decided to end. Without this, status 1 is an end from outside: Ray's core calls `exit(1)`."""
    if number := os.environ.get(END_PIPE):
        with suppress(OSError):  # nobody watches any more
            os.write(int(number), b".")


def run_restarted(command: Sequence[str], config: RunConfig) -> int:
    """Run the driver of a run, and run it again after every death; the exit status of the last one.

    So is a driver that ended for an outage or because its machine goes away, see `ExitStatus`. Every other driver that
    ends by itself has decided: it is not run again. A new driver goes on from the newest checkpoint. Deaths and outages
    count against `cluster.max_failures`, which every new checkpoint resets. SIGINT and
    SIGTERM are passed on, and where this process dies its driver gets a SIGTERM (on Linux).
    """
    storage = Storage(config.storage)
    with ExitStack() as stack:
        lease = stack.enter_context(hold_lease(storage, config.run_folder, print_err))
        driver = _Driver(command, lease.environment())
        stack.enter_context(handling(driver.stop))
        history = AttemptHistory(newest_step(storage, config.run_folder))
        while True:
            status = driver.run()
            last = status if status >= 0 else 128 - status
            if driver.is_stopping or (status >= 0 and status not in RESTARTABLE):
                return last
            failure = _failure(status)
            history = history.after(Attempt(failure, newest_step(storage, config.run_folder)))
            decision = decide(history, config.cluster.max_failures)
            print_err(f"{failure.message}: {decision.reason}")
            if isinstance(decision, Stop):
                return last
            driver.wait(decision.delay_s)
            lease.check()


def _failure(status: int) -> Failure:
    """Why a driver that shall be run again ended."""
    if status == ExitStatus.DRAINED:
        return Failure(None, "preemption", "the machine of the driver is about to be taken away")
    if status == ExitStatus.OUTAGE:
        return Failure(None, "death", "the driver ended because the storage or Ray did not answer")
    return Failure(None, "death", f"the driver was killed ({signal.Signals(-status).name})")


class _Driver:
    """The process that runs now, and the wish to end it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, os.environ | environment
        self._process: subprocess.Popen[bytes] | None = None
        self.is_stopping = False

    def run(self) -> int:
        """Exit status of one more process; negative for the signal that ended it, OUTAGE where Ray ended it."""
        if self.is_stopping:
            return -signal.SIGTERM
        reader, writer = os.pipe()
        try:
            environment = self._environment | {END_PIPE: f"{writer}"}
            self._process = subprocess.Popen(
                self._command, env=environment, preexec_fn=_end_with_parent, pass_fds=(writer,)
            )
            self._environment |= {RESTARTED: "1"}  # the next one
            if self.is_stopping:  # the signal came while the process started
                self._process.send_signal(signal.SIGTERM)
            status = self._process.wait()
            os.write(writer, b"#")  # what the driver has left behind may hold that end open
            decided = os.read(reader, 1) == b"."
        finally:
            os.close(reader)
            os.close(writer)
        return ExitStatus.OUTAGE if status == ExitStatus.GAVE_UP and not decided else status

    def wait(self, seconds: float) -> None:
        """Before the next one, unless there shall be none."""
        deadline = time.monotonic() + seconds
        while not self.is_stopping and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def stop(self, number: signal.Signals) -> None:
        """Pass a signal on, and start no other process."""
        self.is_stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _end_with_parent() -> None:
    """In the new process: an orphan would train on beside the next job of its run."""
    end_with_parent(signal.SIGTERM)
