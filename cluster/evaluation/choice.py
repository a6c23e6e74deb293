"""Pure functions that choose the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

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
