"""How tests wait: for a condition, never for a time."""

import time

PATIENCE_S = 240.0
"""Longest wait for another thread or process: only a defect uses it up, however busy the machine is."""


def wait_until(condition, what="a condition", patience_s=PATIENCE_S, pause_s=0.02):
    """What `condition()` returns as soon as that is true; fails with `what()` or `what` when patience ends."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what() if callable(what) else what}"
        time.sleep(pause_s)
    return found
