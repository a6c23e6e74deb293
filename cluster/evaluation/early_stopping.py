"""Early stopping, decided by pure functions of the evaluations of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2f.cluster.evaluation.queue import Entry
from m2f.trainer.config import EarlyStoppingConfig, TrainingConfig


@dataclass(frozen=True)
class EarlyStop:
    """Decision to end a run early."""

    step: int
    """Step of the checkpoint whose result caused the decision."""
    reason: str
    """One line for the user."""


def early_stop(config: EarlyStoppingConfig, entries: Sequence[Entry]) -> EarlyStop | None:
    """Return the decision at the first result at which the patience is exhausted, or None if there is none.

    Results are read in the order of their steps, up to the first checkpoint that is not evaluated yet. The decision
    therefore does not depend on the order in which results arrive, or on restarts. Checkpoints without the metric are
    skipped.
    """
    best, best_step, num_worse = -math.inf, 0, 0
    for entry in itertools.takewhile(lambda entry: entry.settled, entries):
        value = entry.metrics.get(config.metric, math.nan) if entry.status == "published" else math.nan
        if not math.isfinite(value):
            continue
        if value > best + config.min_delta:
            best, best_step, num_worse = value, entry.step, 0
            continue
        num_worse += 1
        if num_worse >= config.patience:
            delta_text = f" by more than {config.min_delta:g}" if config.min_delta else ""
            return EarlyStop(
                entry.step,
                f"{config.metric} has not risen above {best:.2f} (step {best_step}){delta_text} in {num_worse} "
                f"evaluations (training.early_stopping.patience {config.patience})",
            )
    return None


def unknown_metrics(training: TrainingConfig, entries: Sequence[Entry]) -> list[str]:
    """Return a warning for each metric in `training` that no published result contains; none before the first result.

    Without the metric, the run would never stop early, or would keep no best checkpoint.
    """
    published = [entry for entry in entries if entry.status == "published"]
    if not published:
        return []
    known = ", ".join(sorted(published[-1].metrics)) or "none"
    return [
        f"{setting} is {metric!r}, which no evaluation computes; available: {known}"
        for setting, metric in training.used_metrics.items()
        if not any(metric in entry.metrics for entry in published)
    ]
