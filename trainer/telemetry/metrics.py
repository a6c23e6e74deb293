"""Metrics of the log: losses summed over ranks, storage traffic, throughput and remaining time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m2f.data_pipeline.storage.storage import StorageCounters
from m2f.model.loss.criterion import Losses
from m2f.trainer.ranks import Ranks
from m2f.trainer.telemetry.numbers import LossValues, StorageTraffic, Throughput
from m2f.trainer.telemetry.phases import Phase


class Stopwatch:
    """Measures throughput and phases since the last reading."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Restart the measurement."""
        self.steps = 0
        self.images = 0.0
        self.phases: dict[Phase, float] = {}
        """Seconds in each phase, summed over the steps."""
        self.started = time.perf_counter()

    def add(self, images: float, phases: Mapping[Phase, float]) -> None:
        """Count one step, whether it was applied or skipped."""
        self.steps += 1
        self.images += images
        for phase, seconds in phases.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def read(self, steps_left: int) -> Throughput:
        """Return the throughput since the last reading, and restart the measurement."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        step_s = elapsed / max(self.steps, 1)
        values = Throughput(
            images_per_s=self.images / elapsed,
            step_time_s=step_s,
            data_wait_share=self.phases.get("data", 0.0) / elapsed,
            eta_s=step_s * steps_left,
        )
        self.reset()
        return values


class Traffic:
    """Measures the storage traffic of all ranks since the last reading."""

    def __init__(self, counters: StorageCounters) -> None:
        self._counters = counters
        self._before = self._totals()

    def read(self, ranks: Ranks) -> StorageTraffic:
        """Return requests, retries, megabytes and cache hits of all ranks since the last reading.

        Every rank must call it.
        """
        now = self._totals()
        total = ranks.sum(torch.tensor(now, dtype=torch.float64) - torch.tensor(self._before, dtype=torch.float64))
        self._before = now
        return StorageTraffic(*total.tolist())

    def _totals(self) -> tuple[float, ...]:
        c = self._counters
        sizes = c.bytes_read / 1e6, c.bytes_written / 1e6, c.bytes_cached / 1e6
        return c.requests, c.retries, sizes[0], sizes[1], c.cache_hits, sizes[2]  # the order of StorageTraffic


def sum_over_ranks(terms: Tensor, ranks: Ranks) -> LossValues:
    """Sum the losses of one step over ranks, given each rank's `loss_terms` on CPU, which stay unchanged.

    Every rank must call it.
    """
    kinds = ranks.sum(terms.clone()).tolist()
    return LossValues(sum(kinds), *kinds)


def non_finite_keys(keys: Sequence[Sequence[str]], losses: Sequence[Losses], ranks: Ranks) -> list[str]:
    """Return the sorted keys of all images of the step, on any rank, whose own loss is not finite.

    Every rank must call it.
    """
    own_keys = [
        key
        for batch_keys, loss in zip(keys, losses, strict=True)
        for key, finite in zip(batch_keys, loss.per_image.isfinite().tolist(), strict=True)
        if not finite
    ]
    return sorted(key for found in ranks.gather(own_keys) for key in found)
