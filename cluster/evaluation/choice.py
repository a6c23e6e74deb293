"""Pure functions that choose the next checkpoint to evaluate and the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

HEADLINE = ("PQ", "AP", "mIoU")
"""Headline metrics of the tasks, in order of preference."""


def default_metric(metrics: Mapping[str, float]) -> str | None:
    """Return the metric that ranks checkpoints if the recipe names none; None if there is no headline metric."""
    names = (name for title in HEADLINE for name in sorted(metrics) if name.rpartition("/")[2] == title)
    return next(names, None)


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """Return the step with the highest value of a metric, or the earliest if several tie; None if none has it."""
    values = {step: numbers[name] for step, numbers in metrics.items() if name in numbers}
    return min(values, key=lambda step: (-values[step], step)) if values else None


@dataclass(frozen=True)
class QueueChoice:
    """The step to evaluate next (None if no step waits) and the waiting steps to drop."""

    next: int | None
    dropped: tuple[int, ...] = ()


def choose(waiting: Sequence[int], policy: Literal["every", "latest"]) -> QueueChoice:
    """Choose among the waiting steps. `every` takes the oldest; `latest` takes the newest and drops the others."""
    if not waiting:
        return QueueChoice(None)
    ordered = sorted(waiting)
    match policy:
        case "every":
            return QueueChoice(ordered[0])
        case "latest":
            return QueueChoice(ordered[-1], tuple(ordered[:-1]))
        case _:
            assert_never(policy)
