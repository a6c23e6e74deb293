"""One-line messages about evaluations."""

from __future__ import annotations

from collections.abc import Mapping

from m2f.cluster.evaluation.choice import HEADLINE
from m2f.cluster.evaluation.manager import EvaluationProgress
from m2f.cluster.evaluation.queue import Entry
from m2f.model.format_count import format_count


def describe(entry: Entry) -> str:
    """Return a line about a settled evaluation."""
    if entry.status != "published":
        return f"step {entry.step}: evaluation {entry.status}: {entry.detail}"
    return f"step {entry.step}: evaluated: {headline(entry.metrics)}"


def headline(metrics: Mapping[str, float]) -> str:
    """Return the headline metrics of every set, such as `val PQ 51.20, AP 30.10, mIoU 70.30`."""
    sets = sorted({name.rpartition("/")[0] for name in metrics})
    shown = {s: [f"{n} {metrics[f'{s}/{n}']:.2f}" for n in HEADLINE if f"{s}/{n}" in metrics] for s in sets}
    return "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in shown.items() if numbers)


def describe_start(progress: EvaluationProgress) -> str:
    """Return a line about an evaluation that starts."""
    return f"step {progress.step}: evaluating on {progress.label}, {format_count(progress.total, 'batch', 'batches')}"
