"""Numbers of a training step: of all ranks together, and of one rank. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class LossValues:
    """Losses of one step, summed over micro-batches and ranks, weighted as in the criterion."""

    total: float
    class_: float
    mask: float
    dice: float


@dataclass(frozen=True)
class StorageTraffic:
    """What all ranks read and wrote since the last report."""

    requests: float
    retries: float
    read_mb: float
    written_mb: float
    cache_hits: float
    cached_mb: float


@dataclass(frozen=True)
class Throughput:
    """Pace since the last report."""

    images_per_s: float
    step_time_s: float
    data_wait_share: float
    """Share of the time in which rank 0 waited for data."""
    eta_s: float
    """Seconds to the last step at this pace."""


@dataclass(frozen=True)
class SystemUse:
    """All machines of the run: means of utilization, maxima of memory, the least free disk."""

    cpu_percent: float
    memory_percent: float
    process_gb: float
    disk_free_gb: float
    gpu_memory_gb: float | None = None
    """None on CPU, as the two below."""
    gpu_image_gb: float | None = None
    gpu_percent: float | None = None


@dataclass(frozen=True)
class NodeUse:
    """One machine of the run."""

    host: str
    cpu_percent: float
    memory_percent: float
    process_gb: float
    """Resident memory of all its ranks."""
    disk_free_gb: float
    gpu_memory_gb: float | None = None
    """The most that one of its GPUs held; None on CPU, as the one below."""
    gpu_percent: float | None = None
    """Mean over its GPUs."""

    def numbers(self) -> dict[str, float | None]:
        """All but the name of the machine."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}


@dataclass(frozen=True)
class RankSpread:
    """How far the ranks differ."""

    count: float
    slowest: float
    """Rank that takes longest for its own work."""
    slowest_over_median: float
    """Its time over that of the median rank."""
    slow: float
    """Ranks that were much slower than the median in the last reports."""


@dataclass(frozen=True)
class StepMetrics:
    """Everything that is reported of an optimizer step."""

    loss: LossValues
    storage: StorageTraffic
    throughput: Throughput
    system: SystemUse
    ranks: RankSpread
    grad_norm: float
    """Before clipping."""
    lr: float
    images: float
    """Samples consumed since the start of the run."""
    skipped_steps: float
    """Since the start of the run."""
    nodes: tuple[NodeUse, ...] = ()
    """By host."""
    mfu: float | None = None
    """FLOPs of the model over the peak of all GPUs; None where the peak is unknown."""

    def values(self) -> dict[str, float]:
        """The known numbers under the names that they have in MLflow and in `metrics/` of the run folder."""
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
    """One rank since its last report. Times are seconds per step."""

    rank: int
    host: str
    step_s: float
    data_s: float
    """Waiting for its own data."""
    forward_s: float
    """Forward passes and losses: what a rank computes without the others."""
    exchange_s: float
    """Waiting for the other ranks before the forward pass."""
    process_gb: float
    """Resident memory of the process."""
    cpu_percent: float
    """Of the machine."""
    memory_percent: float
    """Of the machine."""
    disk_free_gb: float
    """Where checkpoints are written first, or in the run folder, whichever has less."""
    gpu_memory_gb: float | None = None
    """Peak of allocated memory since the last report."""
    gpu_image_gb: float | None = None
    """Of it, what one image of a micro-batch took: all that was free again after the step, over the images."""
    gpu_percent: float | None = None
    """Share of time in which a kernel ran on the GPU; None where the driver's library for Python is missing."""

    def values(self) -> Mapping[str, float]:
        """All numbers that are known, by field."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in known.items() if name not in ("rank", "host") and value is not None}
