"""Handling of SIGINT and SIGTERM as requests to stop, in drivers and in ranks, and names of signals."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

DUPLICATE_S = 1.0
"""Seconds after a handled signal in which another one counts as its duplicate.

Terminals and Ray send a signal to all processes of a job, and the parents pass it on as well."""


@contextmanager
def handling_signals(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `handle` for every SIGINT and SIGTERM that is not a duplicate of the last handled one.

    Does nothing outside the main thread, where Python forbids signal handlers. Restores the previous handlers at exit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= DUPLICATE_S:
            last = now
            handle(signal.Signals(number))

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as `SIGKILL`; `signal 40` for one without a name, as most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
