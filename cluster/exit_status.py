"""What the exit status of `m2f` says; `m2f train --restart`, jobs of `m2f submit` and KubeRay go by it."""

from __future__ import annotations

import atexit
import os
import sys
from enum import IntEnum
from typing import NoReturn


class ExitStatus(IntEnum):
    """The only statuses that a verb ends with. Only OUTAGE, DRAINED and deaths by a signal are worth another start."""

    DONE = 0
    GAVE_UP = 1
    """The job ran and failed, or a check found faults."""
    MISTAKE = 2
    """One that the user can correct: one message, no traceback."""
    STOPPED = 3
    """A training run that its user stopped after a checkpoint."""
    OUTAGE = 69
    """The storage did not answer for longer than `storage.patience_s`, or Ray's head or this node's raylet died."""
    DRAINED = 75
    """The machine is about to be taken away; a checkpoint is saved."""
    INTERRUPTED = 130
    """Ctrl-C, in a verb other than `train`."""


MEANINGS = {
    ExitStatus.DONE: "done",
    ExitStatus.GAVE_UP: "the job ran and failed, or found faults",
    ExitStatus.MISTAKE: "a mistake that one message explains",
    ExitStatus.STOPPED: "train: stopped by its user after a checkpoint",
    ExitStatus.OUTAGE: "storage or cluster away for too long; worth another start",
    ExitStatus.DRAINED: "train: the machine goes away, a checkpoint is saved; worth another start",
    ExitStatus.INTERRUPTED: "Ctrl-C",
}
"""What `m2f --help` says."""

RESTARTABLE = (ExitStatus.OUTAGE, ExitStatus.DRAINED)

RESTARTED = "M2F_RESTARTED"
"""Environment variable of a driver that `m2f train --restart` has started again."""


def end_process(status: int) -> NoReturn:
    """End this process, whose work is done, without taking Python down: that takes 2 s of CPU with PyTorch loaded.

    What is registered with `atexit` is called.
    """
    atexit._run_exitfuncs()  # private, and there since Python 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
