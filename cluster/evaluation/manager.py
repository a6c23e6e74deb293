"""Thread that evaluates the committed checkpoints of a run one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from m2f.cluster.evaluation.queue import Entry, EvaluationQueue
from m2f.data_pipeline.errors import OutageError, StorageError
from m2f.trainer.checkpoint.commits import CommitList
from m2f.trainer.errors import LeaseLostError

LOGGER = logging.getLogger(__name__)
RETRY_S = 5.0
"""Pause in seconds after an error of the storage, which has itself repeated the request before."""
MAX_STARTS = 3
"""Number of starts of an evaluation. If the service dies in each of them, the evaluation fails."""


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of the running evaluation: `done` of `total` calls on a data set."""

    step: int
    key: str
    """Key of the entry."""
    label: str
    """Label of the evaluation set."""
    done: int
    total: int


@dataclass(frozen=True)
class EvaluationStatus:
    """Snapshot of the queue and of the running evaluation, which is None if none runs."""

    entries: tuple[Entry, ...]
    current: EvaluationProgress | None
    failure_reason: str | None = None
    """Error that ended the evaluation thread; None while it works."""

    @property
    def idle(self) -> bool:
        """Whether every entry is settled."""
        return all(e.settled for e in self.entries)


Report = Callable[[EvaluationProgress], None]


class EvaluationManager:
    """Finds new commits of a run and evaluates them one at a time in its own thread.

    Args:
        queue: stored queue of the run's evaluations.
        find: lists the commits of the run. It is called about every `poll_interval_s` seconds while no evaluation runs.
        policy: which waiting entry is evaluated next, see `EvaluationQueue.take`.
        evaluate: `evaluate(entry, report)` computes and publishes one entry and returns its headline metrics. After an
            OutageError the entry is evaluated again; any other error except LeaseLostError fails only this entry.
            Publishing must be idempotent, because a process may die after publication and before the queue is updated.
        release: called with entries that are settled, at least once for each.
        poll_interval_s: pause between two calls of `find`, in seconds.

    A StorageError outside `evaluate` delays the evaluations. Any other error ends them, see `EvaluationStatus`.
    """

    def __init__(
        self,
        queue: EvaluationQueue,
        find: Callable[[], CommitList],
        policy: Literal["every", "latest"],
        evaluate: Callable[[Entry, Report], Mapping[str, float]],
        release: Callable[[Sequence[Entry]], None] = lambda settled: None,
        poll_interval_s: float = 1.0,
    ) -> None:
        self._queue = queue
        self._find = find
        self._poll_interval_s = poll_interval_s
        self._policy: Literal["every", "latest"] = policy
        self._evaluate = evaluate
        self._release = release
        self._current: EvaluationProgress | None = None
        self._failure_reason: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def status(self) -> EvaluationStatus:
        """Return all entries, the progress of the running evaluation, and the error that ended the thread, if any."""
        return EvaluationStatus(self._queue.entries(), self._current, self._failure_reason)

    def close(self) -> None:
        """Finish the running evaluation and end the thread. Waiting entries stay in the stored queue."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        released = False
        while not self._closing.is_set():
            try:
                if not released:  # the previous process may have died before it released its settled entries
                    self._release_all([entry for entry in self._queue.entries() if entry.settled])
                    released = True
                self._release_all(self._queue.update(self._find()))
                entry, dropped = self._queue.take(self._policy)
                self._release_all(dropped)
                if entry is None:
                    self._closing.wait(self._poll_interval_s)
                    continue
                self._settle(entry)
                self._release([entry])
            except LeaseLostError as error:
                LOGGER.warning("evaluations stopped: %s", error)
                return
            except StorageError as error:  # an outage, or an error of the queue or a pin; evaluating again is safe
                self._queue.requeue_running()
                released = False  # the error may have come while an entry was released
                LOGGER.warning("evaluations are waiting for the storage: %s", error)
                self._closing.wait(RETRY_S)
            except Exception as error:  # the driver reads the reason, else it would wait for the entries for ever
                LOGGER.exception("evaluations stopped")
                self._failure_reason = f"{type(error).__name__}: {error}"
                return

    def _settle(self, entry: Entry) -> None:
        if entry.starts > MAX_STARTS:
            self._queue.fail(entry, f"the evaluation service died {MAX_STARTS} times while evaluating it")
            return
        try:
            metrics = self._evaluate(entry, self._set_progress)
        except (LeaseLostError, OutageError):
            raise
        except Exception as error:
            LOGGER.exception("the evaluation of step %d failed", entry.step)
            self._queue.fail(entry, f"{type(error).__name__}: {error}")
        else:
            self._queue.publish(entry, metrics)
        finally:
            self._current = None

    def _release_all(self, entries: Sequence[Entry]) -> None:
        if entries:
            self._release(entries)

    def _set_progress(self, progress: EvaluationProgress) -> None:
        self._current = progress
