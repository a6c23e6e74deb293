"""Metrics of a training step, over all ranks and of one rank. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class LossValues:
    """Losses of one step, summed over micro-batches and ranks, with the weights of the criterion."""

    total: float
    class_: float
    mask: float
    dice: float


@dataclass(frozen=True)
class StorageTraffic:
    """Reads and writes of all ranks since the last report. Sizes are in MB."""

    requests: float
    retries: float
    read_mb: float
    written_mb: float
    cache_hits: float
    cached_mb: float


@dataclass(frozen=True)
class Throughput:
    """Throughput since the last report."""

    images_per_s: float
    step_time_s: float
    data_wait_share: float
    """Share of the time that rank 0 spent waiting for data, 0 to 1."""
    eta_s: float
    """Estimated seconds until the last step, at the current throughput."""


@dataclass(frozen=True)
class SystemUse:
    """All machines of the run: means of utilisation, maxima of memory, and the smallest free disk space."""

    cpu_percent: float
    memory_percent: float
    process_gb: float
    disk_free_gb: float
    gpu_memory_gb: float | None = None
    """Maximum over the GPUs, in GB. On CPU, this field and the next two are None."""
    gpu_image_gb: float | None = None
    gpu_percent: float | None = None


@dataclass(frozen=True)
class NodeUse:
    """One machine of the run."""

    host: str
    cpu_percent: float
    memory_percent: float
    process_gb: float
    """Resident memory of all ranks on the machine, in GB."""
    disk_free_gb: float
    gpu_memory_gb: float | None = None
    """Largest peak of any of its GPUs, in GB. On CPU, this field and the next one are None."""
    gpu_percent: float | None = None
    """Mean utilisation of its GPUs, in per cent."""

    def numbers(self) -> dict[str, float | None]:
        """Return all fields except the host, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}


@dataclass(frozen=True)
class RankSpread:
    """Differences between ranks."""

    count: float
    slowest: float
    """Rank whose own work takes longest."""
    slowest_over_median: float
    """Time of the slowest rank divided by that of the median rank."""
    slow: float
    """Number of ranks that were much slower than the median rank in each of the last reports, at the same kind of
    work."""


@dataclass(frozen=True)
class StepMetrics:
    """Everything that is reported about an optimizer step."""

    loss: LossValues
    storage: StorageTraffic
    throughput: Throughput
    system: SystemUse
    ranks: RankSpread
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    images: float
    """Samples consumed since the start of the run."""
    skipped_steps: float
    """Skipped steps since the start of the run."""
    nodes: tuple[NodeUse, ...] = ()
    """Machines, ordered by host."""
    mfu: float | None = None
    """Model FLOPs divided by the peak of all GPUs, 0 to 1; None if the peak is unknown."""

    def values(self) -> dict[str, float]:
        """Return the known metrics under their names in MLflow and in `metrics/` of the run folder."""
        found: dict[str, float | None] = {}
        for group in ("loss", "storage", "system", "ranks"):
            found |= {f"{group}/{name.rstrip('_')}": value for name, value in asdict(getattr(self, group)).items()}
        for node in self.nodes:
            found |= {f"system/{node.host}/{name}": value for name, value in node.numbers().items()}
        found |= asdict(self.throughput)
        found |= {name: getattr(self, name) for name in ("grad_norm", "lr", "images", "skipped_steps", "mfu")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class RankNumbers:
    """Measurements of one rank since its last report. Times are seconds per step."""

    rank: int
    host: str
    step_s: float
    data_s: float
    """Waiting for this rank's own data."""
    forward_s: float
    """Forward passes and losses: work that does not depend on other ranks."""
    exchange_s: float
    """Waiting for other ranks before the forward pass."""
    process_gb: float
    """Resident memory of the process, in GB."""
    cpu_percent: float
    """CPU utilisation of the machine, in per cent."""
    memory_percent: float
    """Memory in use on the machine, in per cent."""
    disk_free_gb: float
    """Free space in GB of the temporary folder, to which checkpoints are written first, or of a local run folder if
    that has less."""
    gpu_memory_gb: float | None = None
    """Peak of allocated GPU memory since the last report, in GB."""
    gpu_image_gb: float | None = None
    """Part of that peak per image of a micro-batch: the peak minus memory still allocated after the step, divided by
    the number of images."""
    gpu_percent: float | None = None
    """Share of time in which a kernel ran on the GPU, in per cent; None if the driver's Python library is missing."""

    def values(self) -> Mapping[str, float]:
        """Return all known measurements by field name, without rank and host."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in known.items() if name not in ("rank", "host") and value is not None}
