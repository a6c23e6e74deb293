"""Run a function in one process per rank, without restarts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m2f.cluster.terminal import print_err
from m2f.cluster.train.processes import RankProcesses
from m2f.cluster.train.signals import handling_signals
from m2f.model.errors import UserError

POLL_S = 1.0
"""Longest wait in seconds for a message or the end of a rank. Either ends the wait, so the value matters little."""


class LaunchError(RuntimeError):
    """A rank failed. The message contains the root cause and that rank's traceback."""


@dataclass(frozen=True)
class _WithoutPost:
    """Adapter for a target that posts no messages: it drops the last argument, `post`."""

    target: Callable[..., None]

    def __call__(self, *arguments: Any) -> None:
        self.target(*arguments[:-1])


def launch(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    num_workers: int,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `target(*arguments)` in `num_workers` processes with torch's launch variables set, and wait for all of them.

    On the first SIGINT or SIGTERM, the processes get SIGTERM. On the second, they are killed.

    Raises:
        UserError: the root cause is a mistake that the user can correct.
        LaunchError: any other failure; names the lowest rank whose failure is not a consequence of another rank's.
        KeyboardInterrupt: a second signal arrived.
    """
    signals = 0
    with RankProcesses(_WithoutPost(target), arguments, num_workers, environment) as ranks:

        def stop(number: signal.Signals) -> None:
            nonlocal signals
            signals += 1
            if signals > 1:
                raise KeyboardInterrupt
            print_err("stopping after a final checkpoint; press Ctrl-C again to stop immediately")
            ranks.ask_to_stop()

        with handling_signals(stop):
            while ranks.running:
                ranks.receive(POLL_S)
    if (found := ranks.first_error()) is None:
        return
    error, report = found
    if isinstance(error, UserError):
        raise error
    raise LaunchError(report)
