"""Observability outside the training loop: timers, metrics, traces and the watchdog."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import datetime
from types import TracebackType
from typing import Any

from m2f.trainer.engine.engine import StepResult
from m2f.trainer.engine.queued_step import QueuedStep, StepValues
from m2f.trainer.reporting import Notice, RankReport, Reporter, StepReport
from m2f.trainer.setup import Run
from m2f.trainer.state import TrainState
from m2f.trainer.telemetry.metrics import Stopwatch, Traffic
from m2f.trainer.telemetry.mfu import Utilization
from m2f.trainer.telemetry.numbers import LossValues, StepMetrics
from m2f.trainer.telemetry.phases import Phase, phase_clock
from m2f.trainer.telemetry.rank_stats import measure_rank, memory_gb, node_uses, rank_spread, slow_ranks, system_use
from m2f.trainer.telemetry.trace import Trace
from m2f.trainer.telemetry.watchdog import Watchdog

SLOW_REPORTS = 3
"""Consecutive reports in which a rank must be slow before a notice is sent."""


class Observer:
    """Observer of one rank; a context manager around the steps.

    `report` is a collective. Construction is one too if `job.attempt` is empty. No other method waits for other ranks.
    """

    def __init__(self, run: Run, reporter: Reporter) -> None:
        job, self._run, self._reporter = run.job, run, reporter
        attempt = job.attempt or run.ranks.broadcast(datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
        self._clock = phase_clock(run.engine.device)
        self._stopwatch = Stopwatch()
        self._traffic = Traffic(run.storage.counters)
        self._utilization = Utilization(job.model, run.engine.device, run.ranks.world_size)
        self._trace = Trace(run.storage, job.run_folder, attempt, run.ranks.rank)
        self._watchdog = Watchdog(self._clock, run.ranks, run.storage, job, attempt, reporter)
        self._size, self._micro_batch = (0, 0), 1
        self._slow: Counter[tuple[int, str]] = Counter()
        self._stack = ExitStack()
        # DeepSpeed starts the backward pass as soon as the module's forward returns.
        self._hook = run.engine.module.register_forward_hook(lambda *_: self._clock.enter("backward"))

    def __enter__(self) -> Observer:
        self._stack.callback(self._hook.remove)
        self._stack.enter_context(closing(self._trace))
        self._stack.enter_context(self._watchdog)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def enter(self, phase: Phase) -> None:
        """Record that the loop enters `phase`."""
        self._clock.enter(phase)

    def lap(self) -> dict[Phase, float]:
        """Record the end of the update; return the seconds spent in each phase that has ended since the last call."""
        self._clock.enter("report")
        return self._clock.lap()

    def record_step(
        self, state: TrainState, step: QueuedStep, values: StepValues, result: StepResult, phases: Mapping[Phase, float]
    ) -> None:
        """Count a finished update and write its trace line, whether it was applied or skipped."""
        self._clock.step = state.step
        self._stopwatch.add(step.images, phases)
        micro_batches = step.batches.micro_batches
        self._micro_batch, *_, height, width = micro_batches[0].targets.id_maps.shape
        self._size = (height, width)
        record: dict[str, Any] = {
            "step": state.step,
            "position": state.position,
            "seconds": {phase: round(seconds, 4) for phase, seconds in phases.items()},
            "loss_share": _number(values.loss_share),
            "grad_norm": _number(result.grad_norm),
            "memory_gb": round(memory_gb(), 3),
        }
        if not result.applied:
            record["skipped"] = True
            record["loss_of"] = {
                key: _number(value)
                for batch, loss in zip(micro_batches, step.losses, strict=True)
                for key, value in zip(batch.keys, loss.per_image.tolist(), strict=True)
            }
        self._trace.write(record)

    def report(self, state: TrainState, loss: LossValues, grad_norm: float) -> StepMetrics | None:
        """Report the metrics of all ranks since the last report.

        Return them on rank 0, otherwise None. Every rank must call it.
        """
        run, stopwatch = self._run, self._stopwatch
        traffic = self._traffic.read(run.ranks)
        own_numbers = measure_rank(
            run.ranks.rank, stopwatch.steps, stopwatch.phases, self._micro_batch, run.job.run_folder
        )
        numbers = run.ranks.gather(own_numbers)
        self._reporter.report(RankReport(state.step, own_numbers))
        if not run.ranks.is_first:
            stopwatch.reset()
            return None
        training = run.job.training
        throughput = stopwatch.read(steps_left=training.max_steps - state.step)
        slow = {(found.rank, found.work): found for found in slow_ranks(numbers)}
        self._slow = Counter({key: self._slow[key] + 1 for key in slow})
        metrics = StepMetrics(
            loss=loss,
            storage=traffic,
            throughput=throughput,
            system=system_use(numbers),
            ranks=rank_spread(
                numbers, slow=len({rank for (rank, _), count in self._slow.items() if count >= SLOW_REPORTS})
            ),
            grad_norm=grad_norm,
            lr=training.optimizer.lr * run.engine.lr_factor,
            images=state.position,
            nodes=node_uses(numbers),
            skipped_steps=state.skipped_total,
            mfu=self._utilization.share(self._size, throughput.images_per_s),
        )
        self._reporter.report(StepReport(state.step, metrics))
        for key, found in slow.items():
            if self._slow[key] == SLOW_REPORTS:
                self._reporter.report(Notice("slow", state.step, str(found)))
        return metrics


def _number(value: float) -> float | str:
    """Return the value rounded to 6 decimals, or as text if it is not finite, which JSON cannot represent."""
    return round(value, 6) if math.isfinite(value) else str(value)
