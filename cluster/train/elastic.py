"""Choose the number of workers of each attempt, which can change if `cluster.num_workers` is a range.

The number never changes during an attempt. A run shrinks if a worker is lost: the next attempt uses the remaining
workers. A run grows if the cluster has had room for more workers for `PATIENCE_S`: the attempt is asked to end after a
checkpoint. In both cases, the next attempt repartitions the optimizer state for its number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.terminal import print_out
from m2f.cluster.train.relay import RunRelay
from m2f.cluster.train.resources import count_fitting
from m2f.model.format_count import format_count

CHECK_INTERVAL_S = 2.0
"""Seconds between two queries of the free resources. PATIENCE_S contains five of them."""
PATIENCE_S = 10.0
"""Seconds to wait for `max_workers` before starting with fewer, and seconds that room for more workers must last.

Resources of an attempt that has just ended are released one by one, and Ray offers those of a dead node for a while."""


@dataclass(frozen=True)
class Resize:
    """One change of the number of workers."""

    before: int
    after: int
    seconds: float
    """Seconds from the end of the previous attempt until the new one resumes."""
    steps_redone: int
    """Number of reported steps that were lost because no checkpoint contained them."""

    def __str__(self) -> str:
        size = f"from {self.before} to {format_count(self.after, 'worker')}"
        return f"{size} in {self.seconds:.1f} s, {format_count(self.steps_redone, 'step')} redone"


def next_size(free: int, config: ClusterConfig, waited_s: float) -> int | None:
    """Return the number of workers to start if there is room for `free` workers; None to keep waiting."""
    if free >= config.max_workers:
        return config.max_workers
    return free if free >= config.min_workers and waited_s >= PATIENCE_S else None


class WorkerScaler:
    """Chooses the number of workers of each attempt of one supervised run, and records the changes."""

    def __init__(
        self,
        config: ClusterConfig,
        nodes: Callable[[], Iterable[Mapping[str, float]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._nodes, self._clock = config, nodes, clock
        self._size: int | None = None
        self._before: int | None = None
        self._ended_at, self._ended_step = clock(), 0
        self._checked_at = clock()
        self._room_since: float | None = None
        self._waiting_since: float | None = None
        self._resume_recorded = False
        self.growing = False
        """Whether the attempt has been asked to end because there is room for more workers."""
        self.resizes: list[Resize] = []

    def next(self) -> int | None:
        """Return the number of workers for the attempt that starts now; None if it must wait.

        A run with a fixed number of workers never waits here. It waits inside Ray, where its pending placement group is
        visible to the autoscaler and to other runs of the cluster.
        """
        is_fixed = self._config.min_workers == self._config.max_workers
        size = self._config.max_workers if is_fixed else self._next_elastic()
        if size is not None:
            self._before, self._size = self._size, size
            self._room_since = self._waiting_since = None
            self.growing = self._resume_recorded = False
        return size

    def check_growth(self, relay: RunRelay) -> None:
        """Record when the attempt resumes, and whether there is room for more workers.

        Call this repeatedly while an attempt runs. The free resources are checked every `CHECK_INTERVAL_S` seconds.
        """
        assert self._size is not None
        if relay.resumed is not None and not self._resume_recorded:
            self._resume_recorded = True
            self._record_resize(relay.resumed.step)
        is_training = relay.resumed is not None or relay.last_step > self._ended_step
        now = self._clock()
        if (
            self._size == self._config.max_workers
            or not is_training
            or self.growing
            or now - self._checked_at < CHECK_INTERVAL_S
        ):
            return
        self._checked_at = now
        if not count_fitting(self._nodes(), self._config.needs):
            self._room_since = None
        elif self._room_since is None:
            self._room_since = now
        elif now - self._room_since >= PATIENCE_S:
            print_out(
                f"resources for more than {format_count(self._size, 'worker')} are free; the run restarts after a "
                "checkpoint"
            )
            self.growing = True

    def record_end(self, relay: RunRelay) -> None:
        """Record the time and the last reported step at the end of an attempt."""
        self._ended_at, self._ended_step = self._clock(), relay.last_step

    def _next_elastic(self) -> int | None:
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        return next_size(count_fitting(self._nodes(), self._config.needs), self._config, now - self._waiting_since)

    def _record_resize(self, step: int) -> None:
        if self._before is None or self._size is None or self._before == self._size:
            return
        redone = max(0, self._ended_step - step)
        self.resizes.append(Resize(self._before, self._size, self._clock() - self._ended_at, redone))
        print_out(f"resized {self.resizes[-1]}")
