"""End a process when its parent dies.

`python -m m2f.cluster.train.orphans PARENT COMMAND...` runs a command that ends when the process PARENT ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Number of this option in <linux/prctl.h>."""


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Make Linux send this signal to the calling process when its parent dies. Does nothing on other systems.

    `parent` is the process id of the parent, because it may have died before this call. Linux also sends the signal
    when only the thread that started the process ends, see `man 2 prctl`.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM, int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
