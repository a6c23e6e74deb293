"""Wait for conditions in tests, instead of sleeping for a fixed time."""

import os
import time

PATIENCE_S = float(os.environ.get("M2F_TEST_PATIENCE_S", "240"))
"""Maximum wait for another thread or process. Only a defect reaches it, even on a busy machine.

`conftest.py` derives it from pytest's timeout of a test, so that `--timeout=1200` is enough on a very busy machine.
"""


def wait_until(condition, what="a condition", patience_s=PATIENCE_S, pause_s=0.02):
    """Return the result of `condition()` as soon as it is true. Fail with `what` or `what()` after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what() if callable(what) else what}"
        time.sleep(pause_s)
    return found
