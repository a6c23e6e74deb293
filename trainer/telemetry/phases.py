"""What a rank is doing just now, and how long each phase of a step takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch

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


class DeviceEvent(Protocol):
    """A point in the work of a device: torch.cuda.Event with timing."""

    def record(self) -> None:
        """The point is behind all work that was given to the device until now."""
        ...

    def query(self) -> bool:
        """Whether the device has got there."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds until another point."""
        ...


class DevicePhases:
    """Phases as a device goes through them. The host runs ahead of a GPU, so its own times would say little.

    Nothing waits for the device: what it has not done yet is counted later.
    """

    def __init__(self, make_event: Callable[[], DeviceEvent]) -> None:
        self._make_event = make_event
        self._passed: deque[tuple[Phase, DeviceEvent]] = deque()

    def enter(self, phase: Phase) -> None:
        """The phase begins behind the work that the device was given."""
        event = self._make_event()
        event.record()
        self._passed.append((phase, event))

    def lap(self) -> dict[Phase, float]:
        """Seconds in each phase that the device has ended since the last call."""
        spent: dict[Phase, float] = {}
        while len(self._passed) > 1 and self._passed[1][1].query():
            phase, begin = self._passed.popleft()
            spent[phase] = spent.get(phase, 0.0) + begin.elapsed_time(self._passed[0][1]) / 1000
        return spent


class PhaseClock:
    """Entered by the training thread; `mark` may be read by any other."""

    def __init__(self, device: DevicePhases | None = None) -> None:
        """`device` counts the seconds of phases where the host's would not be those of the work."""
        self.mark = Mark(0, "start", time.monotonic())
        self.step = 0
        """Optimizer steps done, counted from the start of the run; 0 until this process has done one."""
        self._spent: dict[Phase, float] = {}
        self._device = device
        if device is not None:
            device.enter("start")

    def enter(self, phase: Phase) -> None:
        """The phase that was on until now ends."""
        before, now = self.mark, time.monotonic()
        self._spent[before.phase] = self._spent.get(before.phase, 0.0) + now - before.since
        self.mark = Mark(before.count + 1, phase, now)
        if self._device is not None:
            self._device.enter(phase)

    def lap(self) -> dict[Phase, float]:
        """Seconds in each phase that has ended since the last call."""
        spent, self._spent = self._spent, {}
        return spent if self._device is None else self._device.lap()


def phase_clock(device: torch.device) -> PhaseClock:
    """A clock for ranks on such a device."""
    if device.type != "cuda":
        return PhaseClock()
    return PhaseClock(DevicePhases(lambda: torch.cuda.Event(enable_timing=True)))
