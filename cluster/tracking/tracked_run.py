"""The MLflow run of a run folder, as any process that writes to it must know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.config import StorageConfig


@dataclass(frozen=True)
class RunLease:
    """The lease of a run folder, as far as another process must know it to stop in time."""

    run_folder: str
    number: int
    storage: StorageConfig


@dataclass(frozen=True)
class TrackedRun:
    """All that another process needs to write to the same MLflow run."""

    uri: str
    run_id: str
    spool: str
    """Local folder of the journals."""
    lease: RunLease | None = None
    """Under which the run is written; None for a process that only adds results of its own."""
    remade: bool = False
    """Whether it was made again for a run folder that already holds points and evaluations, which it still lacks."""

    def journal(self, writer: str) -> Path:
        """File of one writer's journal; a holder whose lease is outdated writes to another file than the next one."""
        return Path(self.spool) / (f"{writer}-{self.lease.number}.jsonl" if self.lease else f"{writer}.jsonl")
