"""Exit statuses of `m2f`. They tell `m2f train --restart`, alone or in a job of `m2f submit`, whether to restart."""

from __future__ import annotations

import atexit
import os
import sys
from enum import IntEnum
from typing import NoReturn


class ExitStatus(IntEnum):
    """Every status that a verb can exit with. A restart helps only after OUTAGE, DRAINED or a fatal signal."""

    DONE = 0
    FAILED = 1
    """The job ran and failed, or a check found problems."""
    USER_ERROR = 2
    """The user made a mistake and can correct it. `m2f` prints one message and no traceback."""
    STOPPED = 3
    """The user stopped a training run, which saved a checkpoint first."""
    OUTAGE = 69
    """Storage did not answer for more than `storage.patience_s`, or Ray's head or the raylet of this node died.

    For `m2f submit`, also: the job was lost with its node, or the dashboard does not answer.
    """
    DRAINED = 75
    """The machine is about to be preempted, and the run has saved a checkpoint."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C. During training, the first Ctrl-C means STOPPED, the second INTERRUPTED."""


MEANINGS = {
    ExitStatus.DONE: "done",
    ExitStatus.FAILED: "the job failed, or a check found problems",
    ExitStatus.USER_ERROR: "a user error, explained by one message",
    ExitStatus.STOPPED: "train: stopped by the user after a checkpoint",
    ExitStatus.OUTAGE: "the storage or Ray cluster did not respond for too long; a restart may help",
    ExitStatus.DRAINED: "train: the machine is about to be preempted; a checkpoint is saved, restart to continue",
    ExitStatus.INTERRUPTED: "Ctrl-C",
}
"""Descriptions of the statuses in `m2f --help`."""

RESTARTABLE = (ExitStatus.OUTAGE, ExitStatus.DRAINED)
"""Statuses after which a restart may help."""

RESTARTED_VARIABLE = "M2F_RESTARTED"
"""Environment variable that `m2f train --restart` sets in every driver that it restarts."""


def flush_output() -> None:
    """Flush both standard streams.

    Output that cannot be written, for example to a full disk, is discarded. Otherwise Python would exit with status 120
    instead of the verb's. Raises BrokenPipeError if the reader of a pipe has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_process(status: int) -> NoReturn:
    """Exit without Python's shutdown of the interpreter, which takes 2 s of CPU time with PyTorch loaded.

    Functions registered with `atexit` still run. Call this only when all work is done.
    """
    atexit._run_exitfuncs()  # a private function that has existed since Python 2
    flush_output()
    os._exit(status)
