"""Pool of Ray actors that evaluate the batches of a checkpoint, tolerant of actors that die or hang.

A batch may be computed more than once, for example if an actor dies before it answers; its result is used once. A
batch that failed before runs alone on its actor, so that a poison batch can be identified. An actor that has not
answered a call for `hang_s` seconds is presumed hung: it is killed and replaced, and its batches run again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from m2f.data_pipeline.errors import OutageError
from m2f.eval.errors import EvaluationError

LOGGER = logging.getLogger(__name__)
MAX_CALLS_PER_ACTOR = 2
"""Calls in flight per actor: one runs, and the next waits in the actor, so that it has no pause between batches."""
MAX_ATTEMPTS = 3
"""Attempts of a batch, and deaths in a row of an actor that starts, until the evaluation fails. One may be chance."""
POLL_S = 1.0
"""Longest wait in seconds for a call to end. Hanging actors are looked for after each wait."""
PING_PAUSE_S = 0.5
"""Pause in seconds between two pings of an actor that Ray is restarting."""
QUIET_WARNING_S = 120.0
"""Seconds without a result until a warning, repeated at this interval. The start of the actors should be shorter."""
ASK_TIMEOUT_S = 30.0
"""Seconds for answers of the actors. An actor answers after the batches that it has; later answers are left out."""
OnResult = Callable[[int, bytes], None]


class BatchLedger:
    """Bookkeeping of the batches of one evaluation: waiting, failed and done."""

    def __init__(self, batches: Iterable[int], max_attempts: int = MAX_ATTEMPTS) -> None:
        self._waiting = deque(batches)
        self._total = len(self._waiting)
        self._failures: dict[int, int] = {}
        self._max_attempts = max_attempts
        self.done: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every batch has a result."""
        return len(self.done) == self._total

    def is_suspect(self, batch: int) -> bool:
        """Return whether the batch failed before and must therefore run alone."""
        return batch in self._failures

    def take(self, idle: bool) -> int | None:
        """Return the next batch for an actor, or None if no batch waits or the next one needs an idle actor."""
        if not self._waiting or (self.is_suspect(self._waiting[0]) and not idle):
            return None
        return self._waiting.popleft()

    def finish(self, batch: int) -> bool:
        """Mark a batch as done. Return False for a late duplicate; the caller must not use its result."""
        was_done = batch in self.done
        self.done.add(batch)
        return not was_done

    def fail(self, batch: int, reason: str) -> None:
        """Put a failed batch at the end of the queue. Raises EvaluationError after its `max_attempts`-th failure."""
        if batch in self.done:
            return
        self._failures[batch] = self._failures.get(batch, 0) + 1
        if self._failures[batch] >= self._max_attempts:
            raise EvaluationError(
                f"evaluation batch {batch} failed {self._failures[batch]} times, last error: {reason}"
            )
        self._waiting.append(batch)


@dataclass
class _Slot:
    """A place in the pool with its current actor."""

    actor: Any
    batches: set[int] = field(default_factory=set)
    """Batches in flight."""
    call_started_at: float = 0.0
    """Monotonic time in seconds from which the actor could work on its current call."""
    needs_ping: bool = True
    """Whether the actor gets no batches until it answers a ping. Every actor starts in this state."""
    pinging: bool = False
    """Whether a ping is in flight."""
    next_ping_at: float = 0.0
    """Earliest monotonic time in seconds of the next ping."""
    answered: bool = False
    """Whether the actor has ever answered a ping. Until then it may wait for resources and is not presumed hung."""
    deaths: int = 0
    """Number of times in a row that the actor could not be created."""


@dataclass(frozen=True)
class _Call:
    """A call in flight; `batch` is None for a ping."""

    slot: _Slot
    batch: int | None


class EvaluationPool:
    """Pool of `size` actors, which are kept between evaluations.

    `spawn()` creates an actor with the methods `ping()` and `evaluate(task, batch) -> bytes`. An actor that has not
    answered a call for `hang_s` seconds is replaced.
    """

    def __init__(self, spawn: Callable[[], Any], size: int, hang_s: float) -> None:
        self._spawn = spawn
        self._hang_s = hang_s
        self._slots = [_Slot(spawn()) for _ in range(size)]

    def run(self, task: Any, batches: Iterable[int], on_result: OnResult) -> None:
        """Evaluate all batches and pass every result to `on_result(batch, result)` once, as soon as it arrives.

        Raises:
            EvaluationError: a batch failed or hung MAX_ATTEMPTS times, or an actor could not be created.
            OutageError: the storage did not answer an actor for longer than `storage.patience_s`.
        """
        ledger = BatchLedger(batches)
        for slot in self._slots:
            slot.deaths = 0
        calls: dict[Any, _Call] = {}
        task_ref = ray.put(task)
        last_result = time.monotonic()
        try:
            while not ledger.complete:
                self._submit(ledger, calls, task_ref)
                before = len(ledger.done)
                for ref in _next_ready(calls):
                    self._receive(ref, calls.pop(ref), ledger, on_result)
                self._replace_hanging(ledger, calls)
                if len(ledger.done) > before:
                    last_result = time.monotonic()
                elif time.monotonic() - last_result > QUIET_WARNING_S:
                    last_result = time.monotonic()
                    LOGGER.warning(
                        "no evaluation result for %.0f s; check whether the actors have resources", QUIET_WARNING_S
                    )
        finally:
            self._cancel(calls)

    def ask(self, method: str) -> list[Any]:
        """Call a method without arguments on the actors and return the answers that arrive within ASK_TIMEOUT_S.

        Actors that have not answered a ping yet are not called.
        """
        refs = [getattr(slot.actor, method).remote() for slot in self._slots if slot.answered]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=ASK_TIMEOUT_S) if refs else ([], [])
        answers = []
        for ref in ready:
            with suppress(RayError):
                answers.append(ray.get(ref))
        return answers

    def close(self) -> None:
        """Kill the actors. The pool cannot be used afterwards."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []

    def _submit(self, ledger: BatchLedger, calls: dict[Any, _Call], task: Any) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.needs_ping:
                if not slot.pinging and now >= slot.next_ping_at:
                    slot.pinging, slot.call_started_at = True, now
                    calls[slot.actor.ping.remote()] = _Call(slot, None)
                continue
            while len(slot.batches) < MAX_CALLS_PER_ACTOR and not any(map(ledger.is_suspect, slot.batches)):
                batch = ledger.take(idle=not slot.batches)
                if batch is None:
                    break
                if not slot.batches:
                    slot.call_started_at = now
                slot.batches.add(batch)
                calls[slot.actor.evaluate.remote(task, batch)] = _Call(slot, batch)

    def _receive(self, ref: Any, call: _Call, ledger: BatchLedger, on_result: OnResult) -> None:
        slot, batch = call.slot, call.batch
        if batch is None:
            self._receive_ping(ref, slot)
            return
        slot.batches.discard(batch)
        slot.call_started_at = time.monotonic()
        try:
            result = ray.get(ref)
        except RayActorError as error:
            slot.needs_ping = True
            ledger.fail(batch, f"its actor died ({type(error).__name__})")
        except RayTaskError as error:
            if isinstance(error.cause, OutageError):  # the failure was not caused by a batch
                raise error.cause from None
            ledger.fail(batch, f"{type(error.cause).__name__}: {error.cause}")
        else:
            if ledger.finish(batch):
                on_result(batch, result)

    def _receive_ping(self, ref: Any, slot: _Slot) -> None:
        slot.pinging = False
        slot.next_ping_at = time.monotonic() + PING_PAUSE_S
        try:
            ray.get(ref)
        except ActorDiedError as error:  # it is permanently dead; in all other cases Ray restarts the actor
            slot.deaths += 1
            if slot.deaths >= MAX_ATTEMPTS:
                raise EvaluationError(f"an evaluation actor could not be started: {error}") from None
            slot.actor, slot.answered = self._spawn(), False
        except RayActorError:
            return
        else:
            slot.needs_ping, slot.answered, slot.deaths = False, True, 0

    def _replace_hanging(self, ledger: BatchLedger, calls: dict[Any, _Call]) -> None:
        """Kill and replace actors whose answer is overdue.

        All of their batches count as failed, since any of them may be the cause.
        """
        now = time.monotonic()
        for slot in self._slots:
            has_pending_call = bool(slot.batches) or (slot.pinging and slot.answered)
            if not has_pending_call or now - slot.call_started_at <= self._hang_s:
                continue
            LOGGER.warning("replacing an evaluation actor that did not respond for %.0f s", self._hang_s)
            ray.kill(slot.actor)
            overdue, slot.batches = slot.batches, set()
            slot.actor, slot.answered = self._spawn(), False
            slot.needs_ping, slot.pinging = True, False
            for ref in [ref for ref, call in calls.items() if call.slot is slot]:
                del calls[ref]
            for batch in sorted(overdue):
                ledger.fail(batch, f"its actor did not respond for {self._hang_s:g} s (evaluation.hang_s)")

    def _cancel(self, calls: dict[Any, _Call]) -> None:
        """Cancel the calls in flight, which are late duplicates or belong to a failed evaluation.

        Their actors must answer a ping before they get the next batch.
        """
        for ref, call in calls.items():
            ray.cancel(ref, recursive=False)
            call.slot.batches.clear()
            call.slot.needs_ping, call.slot.pinging = True, False


def _next_ready(calls: dict[Any, _Call]) -> list[Any]:
    """Wait up to POLL_S for a call to end and return the finished calls.

    If no calls are in flight, because every actor waits for its next ping, sleep for PING_PAUSE_S.
    """
    if not calls:
        time.sleep(PING_PAUSE_S)
        return []
    ready, _ = ray.wait(list(calls), timeout=POLL_S)
    return ready
