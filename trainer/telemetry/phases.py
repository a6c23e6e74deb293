"""What a rank is doing just now, and how long each phase of a step takes."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

Phase = Literal["start", "data", "exchange", "forward", "backward", "update", "report", "checkpoint"]
"""start: before the first step; data: waiting for the loader; exchange: waiting for all ranks; update: gradient norm
and optimizer; report: losses and numbers of all ranks; checkpoint: saving, and waiting for the upload before."""


class Mark(NamedTuple):
    """Where a rank is. All ranks pass the same phases in the same order, so the lowest count is furthest behind."""

    count: int
    """Phases entered so far."""
    phase: Phase
    since: float
    """`time.monotonic()` at its beginning."""


class PhaseClock:
    """Entered by the training thread; `mark` may be read by any other."""

    def __init__(self) -> None:
        self.mark = Mark(0, "start", time.monotonic())
        self.step = 0
        """Optimizer steps done, counted from the start of the run; 0 until this process has done one."""
        self._spent: dict[Phase, float] = {}

    def enter(self, phase: Phase) -> None:
        """The phase that was on until now ends."""
        before, now = self.mark, time.monotonic()
        self._spent[before.phase] = self._spent.get(before.phase, 0.0) + now - before.since
        self.mark = Mark(before.count + 1, phase, now)

    def lap(self) -> dict[Phase, float]:
        """Seconds in each phase that has ended since the last call."""
        spent, self._spent = self._spent, {}
        return spent
