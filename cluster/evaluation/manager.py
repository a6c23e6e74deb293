"""The evaluation manager: its own detached actor, fed with committed checkpoints, that training never waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from m2f.cluster.evaluation.queue import Entry, EvaluationQueue
from m2f.data_pipeline.errors import StorageError
from m2f.trainer.errors import LeaseLostError

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

    `evaluate(entry, report)` computes and publishes one entry and returns its headline numbers. Publishing twice must
    be harmless, since a manager that dies between publication and ledger does it again; what it raises fails that
    entry alone. `release(entry)` is called at least once for every settled entry.
    """

    def __init__(
        self,
        queue: EvaluationQueue,
        policy: Literal["every", "latest"],
        evaluate: Callable[[Entry, Report], Mapping[str, float]],
        release: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._queue = queue
        self._policy: Literal["every", "latest"] = policy
        self._evaluate = evaluate
        self._release = release
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
        released = False
        while not self._closing:
            try:
                if not released:  # the process before this one may have died just before it did so
                    self._release_all(entry for entry in self._queue.entries() if entry.settled)
                    released = True
                self._wake.clear()
                entry, dropped = self._queue.take(self._policy)
                self._release_all(dropped)
                if entry is None:
                    self._wake.wait()
                    continue
                self._settle(entry)
                self._release(entry)
            except LeaseLostError as error:
                LOGGER.warning("no more evaluations: %s", error)
                return
            except StorageError as error:  # of the queue or a pin: do it again, results of the same step are the same
                self._queue.put_back()
                LOGGER.warning("evaluations wait for the storage: %s", error)
                self._wake.wait(RETRY_S)

    def _settle(self, entry: Entry) -> None:
        try:
            metrics = self._evaluate(entry, self._note)
        except LeaseLostError:
            raise
        except Exception as error:
            LOGGER.exception("the evaluation of step %d failed", entry.step)
            self._queue.fail(entry.step, f"{type(error).__name__}: {error}")
        else:
            self._queue.publish(entry.step, metrics)
        finally:
            self._current = None

    def _release_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._release(entry)

    def _note(self, progress: EvaluationProgress) -> None:
        self._current = progress
