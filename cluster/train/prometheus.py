"""Prometheus metrics of a run, exported on the metrics port of every Ray node.

A restart creates new worker processes and therefore new time series; group by the tags `run` and `rank`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from m2f.trainer.reporting import CommitReport, Event, Notice, RankReport, StepReport

RUN_GAUGES = {
    "images_per_s": ("m2f_images_per_second", "Training throughput in images per second, over all ranks."),
    "data_wait_share": ("m2f_data_wait_ratio", "Fraction of time that rank 0 waits for data."),
    "loss/total": ("m2f_loss", "Loss of the last reported step."),
    "grad_norm": ("m2f_grad_norm", "Norm of the gradients before clipping."),
    "mfu": ("m2f_mfu_ratio", "Model FLOP/s divided by the bf16 peak of all GPUs."),
    "skipped_steps": ("m2f_skipped_steps", "Updates skipped since the start of the run."),
    "ranks/count": ("m2f_ranks", "Number of training workers."),
    "ranks/slowest_over_median": (
        "m2f_slowest_rank_ratio",
        "Time of the slowest rank divided by that of the median rank.",
    ),
    "ranks/slow": ("m2f_slow_ranks", "Number of ranks much slower than the median in the last reports."),
    "eta_s": ("m2f_eta_seconds", "Estimated time until the last step."),
}
"""Name and description of the gauge for each metric of the run."""
RANK_GAUGES = {
    "step_s": ("m2f_rank_step_seconds", 1.0, "Time per step."),
    "data_s": ("m2f_rank_data_wait_seconds", 1.0, "Time waiting for data, per step."),
    "forward_s": ("m2f_rank_forward_seconds", 1.0, "Time of forward passes and losses, per step."),
    "exchange_s": ("m2f_rank_exchange_seconds", 1.0, "Time waiting for other ranks before the forward pass, per step."),
    "process_gb": ("m2f_rank_process_bytes", 1e9, "Resident memory of the process."),
    "gpu_memory_gb": ("m2f_rank_gpu_memory_bytes", 1e9, "Peak of allocated GPU memory since the last report."),
    "gpu_image_gb": ("m2f_rank_gpu_image_bytes", 1e9, "Part of the GPU memory peak per image of a micro-batch."),
    "gpu_percent": ("m2f_rank_gpu_utilization_percent", 1.0, "Percentage of time that the GPU was busy."),
}
"""Name, factor to the unit in the name, and description of the gauge for each number of a rank."""


class PrometheusReporter:
    """Reporter that sets gauges, which Ray's agent on each node exports. It must be created inside a Ray worker."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run}
        self._rank_tags = {"run": run, "rank": str(rank)}
        self._step = Gauge("m2f_step", "Completed optimizer steps.", ("run",))
        self._run = {key: Gauge(name, text, ("run",)) for key, (name, text) in RUN_GAUGES.items()}
        self._rank = {key: Gauge(name, text, ("run", "rank")) for key, (name, _, text) in RANK_GAUGES.items()}
        self._checkpoint = Gauge("m2f_checkpoint_step", "Step of the newest checkpoint.", ("run",))
        self._events = Counter("m2f_events", "Number of events of the run, by kind.", ("run", "kind"))
        self._is_first = rank == 0

    def report(self, event: Event) -> None:
        """Update the gauges of the run and of this rank, and count notices by kind."""
        match event:
            case StepReport(step, metrics):
                self._step.set(step, self._tags)
                self._set(self._run, metrics.values(), self._tags)
            case RankReport(_, numbers):
                values = {
                    key: value * RANK_GAUGES[key][1] for key, value in numbers.values().items() if key in self._rank
                }
                self._set(self._rank, values, self._rank_tags)
            case CommitReport(checkpoint):
                if self._is_first:
                    self._checkpoint.set(checkpoint.step, self._tags)
            case Notice(kind):
                self._events.inc(1, {**self._tags, "kind": kind})

    @staticmethod
    def _set(gauges: Mapping[str, Gauge], values: Mapping[str, float], tags: dict[str, str]) -> None:
        for key, gauge in gauges.items():
            if key in values:
                gauge.set(values[key], tags)
