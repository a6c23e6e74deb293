"""Whether a run ends before its last step: a pure function of the ledger of its evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2f.cluster.evaluation.queue import Entry
from m2f.trainer.config import EarlyStoppingConfig


@dataclass(frozen=True)
class EarlyStop:
    """Why a run ends early."""

    step: int
    """Of the checkpoint whose result decided."""
    reason: str
    """One line."""


def early_stop(config: EarlyStoppingConfig, entries: Sequence[Entry]) -> EarlyStop | None:
    """The first result, by step, after which patience is over; None where there is none.

    Results count in the order of their steps, up to the first checkpoint that still waits: whatever the order in which
    they arrive, and whoever asks after a restart, the answer is the same. Checkpoints without the metric do not count.
    """
    best, best_step, since = -math.inf, 0, 0
    for entry in itertools.takewhile(lambda entry: entry.settled, entries):
        value = entry.metrics.get(config.metric, math.nan) if entry.status == "published" else math.nan
        if not math.isfinite(value):
            continue
        if value > best + config.min_delta:
            best, best_step, since = value, entry.step, 0
            continue
        since += 1
        if since >= config.patience:
            above = f" by more than {config.min_delta:g}" if config.min_delta else ""
            return EarlyStop(
                entry.step,
                f"{config.metric} has not risen above {best:.2f} (step {best_step}){above} in {since} evaluations "
                f"(training.early_stopping.patience {config.patience})",
            )
    return None


def unknown_metric(config: EarlyStoppingConfig, entries: Sequence[Entry]) -> str | None:
    """What to say where results are there and none has the metric, so that it never ends the run."""
    published = [entry for entry in entries if entry.status == "published"]
    if not published or any(config.metric in entry.metrics for entry in published):
        return None
    known = ", ".join(sorted(published[-1].metrics)) or "none"
    return f"training.early_stopping.metric is {config.metric!r}, which no evaluation has; they have: {known}"
