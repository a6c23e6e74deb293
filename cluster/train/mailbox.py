"""Bounded mailbox between rank 0 and the driver, as an actor: rank 0 posts events, the driver polls them."""

from __future__ import annotations

from collections import deque

from m2f.trainer.reporting import Event

MAX_EVENTS = 10_000


class Mailbox:
    """Events that the driver does not poll in time are dropped, the oldest first: the run folder has what counts."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._stop = False

    def post(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    def poll(self, stop: bool) -> tuple[Event, ...]:
        """All events since the last poll, in order.

        `stop` says whether the ranks shall end after a checkpoint. The driver gives it with every poll, since an actor
        that is made again has forgotten it.
        """
        self._stop = stop
        events = tuple(self._events)
        self._events.clear()
        return events

    def stop_requested(self) -> bool:
        """What the driver gave with its last poll."""
        return self._stop
