"""Current phase of a rank, and the time spent in each phase of a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch

Phase = Literal["start", "data", "exchange", "forward", "backward", "update", "report", "checkpoint"]
"""start: before the first step; data: waiting for the loader; exchange: waiting for all ranks; update: gradient norm
and optimizer; report: losses and metrics of all ranks; checkpoint: waiting for the previous upload, and saving."""


class Mark(NamedTuple):
    """Progress of a rank.

    All ranks enter the same phases in the same order, so the rank with the lowest count is furthest behind.
    """

    count: int
    """Phases entered so far."""
    phase: Phase
    since: float
    """`time.monotonic()` at the start of the phase."""


class DeviceEvent(Protocol):
    """A point in the work queue of a device; torch.cuda.Event with timing implements it."""

    def record(self) -> None:
        """Place the point after all work that is queued on the device now."""
        ...

    def query(self) -> bool:
        """Return whether the device has reached the point."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this point to `end_event`."""
        ...


class DevicePhases:
    """Times phases on the device. The host runs ahead of a GPU, so host times do not show how long the work takes.

    Nothing waits for the device: a phase that is not finished yet is counted later.
    """

    def __init__(self, make_event: Callable[[], DeviceEvent]) -> None:
        self._make_event = make_event
        self._events: deque[tuple[Phase, DeviceEvent]] = deque()

    def enter(self, phase: Phase) -> None:
        """Start the phase after the work that is queued on the device now."""
        event = self._make_event()
        event.record()
        self._events.append((phase, event))

    def lap(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase that the device has finished since the last call."""
        spent: dict[Phase, float] = {}
        while len(self._events) > 1 and self._events[1][1].query():
            phase, begin = self._events.popleft()
            spent[phase] = spent.get(phase, 0.0) + begin.elapsed_time(self._events[0][1]) / 1000
        return spent


class PhaseClock:
    """Clock of one rank. The training thread enters phases; any other thread may read `mark`."""

    def __init__(self, device: DevicePhases | None = None) -> None:
        """If `device` is given, phases are timed on the device; otherwise on the host."""
        self.mark = Mark(0, "start", time.monotonic())
        self.step = 0
        """Optimizer steps since the start of the run; 0 until this process has finished one."""
        self._spent: dict[Phase, float] = {}
        self._device = device
        if device is not None:
            device.enter("start")

    def enter(self, phase: Phase) -> None:
        """End the current phase and start `phase`."""
        before, now = self.mark, time.monotonic()
        self._spent[before.phase] = self._spent.get(before.phase, 0.0) + now - before.since
        self.mark = Mark(before.count + 1, phase, now)
        if self._device is not None:
            self._device.enter(phase)

    def lap(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase that has ended since the last call."""
        spent, self._spent = self._spent, {}
        return spent if self._device is None else self._device.lap()


def phase_clock(device: torch.device) -> PhaseClock:
    """Return a clock for a rank on `device`; phases are timed on the device if it is a GPU."""
    if device.type != "cuda":
        return PhaseClock()
    return PhaseClock(DevicePhases(lambda: torch.cuda.Event(enable_timing=True)))
