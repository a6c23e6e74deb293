"""SIGINT and SIGTERM as a request to end, in drivers and in ranks."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_S = 1.0
"""Terminals and Ray send a signal to all processes of a job, and parents pass it on: another so soon is an echo."""


@contextmanager
def handling(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `handle` for every SIGINT and SIGTERM that is no echo of the last one.

    Nothing is handled outside the main thread, where Python forbids it. The handlers from before come back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= ECHO_S:
            last = now
            handle(signal.Signals(number))

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
