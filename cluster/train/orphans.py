"""End a process when its parent dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Make Linux send this signal to the calling process when its parent dies. Does nothing on other systems.

    Linux also sends the signal when only the thread that started the process ends, see `man 2 prctl`.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), number)
