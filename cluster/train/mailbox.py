"""Bounded mailbox between rank 0 and the driver, run as a Ray actor: rank 0 posts events, and the driver polls them."""

from __future__ import annotations

from collections import deque

from m2f.trainer.reporting import Event

MAX_EVENTS = 10_000
"""Number of events that wait for the driver. It bounds the memory of the actor while a driver is away."""


class Mailbox:
    """Queue of at most `MAX_EVENTS` events. If it is full, the oldest is dropped.

    Nothing essential is lost, because the run folder holds the durable records.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._stop = False

    def post(self, event: Event) -> None:
        """Add an event; drop the oldest event if the mailbox is full."""
        self._events.append(event)

    def poll(self, stop: bool) -> tuple[Event, ...]:
        """Return all events since the last poll, in order.

        `stop` asks the ranks to end after a checkpoint. The driver repeats it at every poll, because a restarted actor
        has lost it.
        """
        self._stop = stop
        events = tuple(self._events)
        self._events.clear()
        return events

    def stop_requested(self) -> bool:
        """Return the value of `stop` in the driver's last poll."""
        return self._stop
