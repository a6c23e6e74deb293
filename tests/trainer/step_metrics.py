"""Sample step metrics for tests."""

from dataclasses import replace

from m2f.trainer.telemetry.numbers import LossValues, RankSpread, StepMetrics, StorageTraffic, SystemUse, Throughput

METRICS = StepMetrics(
    loss=LossValues(total=31.25, class_=11.0, mask=10.25, dice=10.0),
    storage=StorageTraffic(requests=8.0, retries=2.0, read_mb=4.25, written_mb=0.0, cache_hits=1.0, cached_mb=1.0),
    throughput=Throughput(images_per_s=12.34, step_time_s=0.81, data_wait_share=0.031, eta_s=3661.0),
    system=SystemUse(cpu_percent=55.0, memory_percent=31.0, process_gb=3.0, disk_free_gb=812.0),
    ranks=RankSpread(count=4.0, slowest=3.0, slowest_over_median=1.7, slow=1.0),
    grad_norm=123.4,
    lr=1e-4,
    images=320.0,
    skipped_steps=1.0,
)


def with_loss(total: float) -> StepMetrics:
    """Return `METRICS` with another total loss."""
    return replace(METRICS, loss=replace(METRICS.loss, total=total))
