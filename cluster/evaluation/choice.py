"""Which waiting checkpoints are evaluated, and which one is the best: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

HEADLINE = ("PQ", "AP", "mIoU")
"""The main number of each task."""


def first_headline(metrics: Mapping[str, float]) -> str | None:
    """Name of the main number by which checkpoints are judged if the recipe names none; None where there is none."""
    names = (name for title in HEADLINE for name in sorted(metrics) if name.rpartition("/")[2] == title)
    return next(names, None)


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """The step with the highest value of a metric, the earliest of several; None where no step has the metric."""
    values = {step: numbers[name] for step, numbers in metrics.items() if name in numbers}
    return min(values, key=lambda step: (-values[step], step)) if values else None


@dataclass(frozen=True)
class QueueChoice:
    """Which waiting checkpoint is evaluated next, and which are given up."""

    next: int | None
    dropped: tuple[int, ...] = ()


def choose(waiting: Sequence[int], policy: Literal["every", "latest"]) -> QueueChoice:
    """Choice among the steps that wait: `every` takes the oldest, `latest` the newest and drops the others."""
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
