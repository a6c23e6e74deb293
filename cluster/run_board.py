"""The board between training workers and the driver: reports travel one way, the wish to stop the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.reporting import CommittedCheckpoint, EventKind, Reporter

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


class RunBoard:
    """The actor: rank 0 pins reports up, the driver takes them down. The oldest fall off when nobody takes them."""

    def __init__(self) -> None:
        self._reports: deque[Report] = deque(maxlen=MAX_REPORTS)
        self._stop = False

    def pin(self, report: Report) -> None:
        """Add a report."""
        self._reports.append(report)

    def take(self) -> list[Report]:
        """All reports since the last call, in order."""
        taken = list(self._reports)
        self._reports.clear()
        return taken

    def request_stop(self) -> None:
        """Ask the workers to end after a checkpoint."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether the workers shall end."""
        return self._stop
