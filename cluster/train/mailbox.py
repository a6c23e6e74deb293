"""The board between training workers and the driver: reports travel one way, the driver's word the other."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from m2f.trainer.reporting import CommittedCheckpoint, EventKind, Reporter

MAX_REPORTS = 10_000


@dataclass(frozen=True)
class MetricsReport:
    """Values at an optimizer step."""

    step: int
    values: Mapping[str, float]

    def tell(self, reporter: Reporter) -> None:
        """Repeat it to a reporter on this side."""
        reporter.metrics(self.step, self.values)


@dataclass(frozen=True)
class CheckpointReport:
    """A commit."""

    checkpoint: CommittedCheckpoint

    def tell(self, reporter: Reporter) -> None:
        """Repeat it to a reporter on this side."""
        reporter.checkpoint(self.checkpoint)


@dataclass(frozen=True)
class EventReport:
    """Something worth a line."""

    kind: EventKind
    step: int
    message: str

    def tell(self, reporter: Reporter) -> None:
        """Repeat it to a reporter on this side."""
        reporter.event(self.kind, self.step, self.message)


Report = MetricsReport | CheckpointReport | EventReport


@dataclass(frozen=True)
class Delivery:
    """Reports on their way to the driver, which says with its next call that it has them."""

    board: str
    """Names this life of the board: after a restart it counts anew."""
    last: int
    """Number of the newest report that the board has had."""
    reports: tuple[Report, ...]
    """In order; the last of them has the number `last`."""


@dataclass(frozen=True)
class Word:
    """What the driver has to say to rank 0."""

    stop: bool = False
    """Whether the workers shall end after a checkpoint."""
    metrics_step: int = 0
    """Last step whose metrics it has written to disk."""


class RunBoard:
    """The actor: rank 0 pins reports up, the driver takes them down. The oldest fall off when nobody takes them."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._reports: deque[Report] = deque(maxlen=MAX_REPORTS)
        self._last = 0
        self._word = Word()

    def pin(self, report: Report) -> None:
        """Add a report."""
        self._reports.append(report)
        self._last += 1

    def take(self, received: Delivery | None, word: Word) -> Delivery:
        """Everything after `received`, which the driver has: an answer that got lost on the way is given again.

        `word` stands until the next call. The driver gives it with every call, since a board that dies forgets it.
        """
        self._word = word
        if received is not None and received.board == self._name:
            while self._reports and self._last - len(self._reports) < received.last:
                self._reports.popleft()
        return Delivery(self._name, self._last, tuple(self._reports))

    def word(self) -> Word:
        """The driver's last one."""
        return self._word
