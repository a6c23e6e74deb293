"""The evaluation manager: its own detached actor, fed with committed checkpoints, that training never waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.eval_queue import Entry, EvaluationQueue
from data_pipeline.errors import StorageError

LOGGER = logging.getLogger(__name__)
RETRY_S = 5.0


@dataclass(frozen=True)
class EvaluationProgress:
    """How far the running evaluation is."""

    step: int
    dataset: str
    done: int
    total: int


@dataclass(frozen=True)
class EvaluationStatus:
    """What the manager knows at one moment."""

    entries: tuple[Entry, ...]
    current: EvaluationProgress | None

    @property
    def idle(self) -> bool:
        """Whether every entry is settled."""
        return all(e.settled for e in self.entries)


Report = Callable[[EvaluationProgress], None]


class EvaluationManager:
    """Evaluates queued checkpoints one after the other in a thread of its own.

    `evaluate(entry, report)` computes and publishes one entry; publishing twice must be harmless, since a manager that
    dies between publication and ledger does it again. Whatever it raises fails that entry alone.
    """

    def __init__(
        self,
        queue: EvaluationQueue,
        policy: Literal["every", "latest"],
        evaluate: Callable[[Entry, Report], None],
    ) -> None:
        self._queue = queue
        self._policy: Literal["every", "latest"] = policy
        self._evaluate = evaluate
        self._current: EvaluationProgress | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def submit(self, step: int, checkpoint: str) -> bool:
        """Queue a committed checkpoint; False if its step was queued before. Returns when the queue is stored."""
        added = self._queue.add(step, checkpoint)
        self._wake.set()
        return added

    def status(self) -> EvaluationStatus:
        """Entries and the running evaluation."""
        return EvaluationStatus(self._queue.entries(), self._current)

    def close(self) -> None:
        """Finish the running evaluation and end the thread; what waits stays in the stored queue."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            try:
                entry = self._queue.take(self._policy)
                if entry is None:
                    self._wake.wait()
                    self._wake.clear()
                    continue
                self._settle(entry)
            except StorageError as error:  # of the queue itself: its entries are safe in memory, so try again
                LOGGER.warning("the queue of evaluations cannot be stored: %s", error)
                self._wake.wait(RETRY_S)

    def _settle(self, entry: Entry) -> None:
        try:
            self._evaluate(entry, self._note)
        except Exception as error:
            LOGGER.exception("the evaluation of step %d failed", entry.step)
            self._queue.settle(entry.step, "failed", f"{type(error).__name__}: {error}")
        else:
            self._queue.settle(entry.step, "published")
        finally:
            self._current = None

    def _note(self, progress: EvaluationProgress) -> None:
        self._current = progress
