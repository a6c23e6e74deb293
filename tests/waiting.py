"""How tests wait: for a condition, never for a time."""

import os
import time

PATIENCE_S = float(os.environ.get("M2F_TEST_PATIENCE_S", "240"))
"""Longest wait for another thread or process: only a defect uses it up, however busy the machine is.

`conftest.py` derives it from pytest's timeout of a test, so that `--timeout=1200` is enough on a very busy machine.
"""


def wait_until(condition, what="a condition", patience_s=PATIENCE_S, pause_s=0.02):
    """What `condition()` returns as soon as that is true; fails with `what()` or `what` when patience ends."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what() if callable(what) else what}"
        time.sleep(pause_s)
    return found
