"""Description of the MLflow run of a run folder, for the processes that write to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f.data_pipeline.config import StorageConfig


@dataclass(frozen=True)
class RunLease:
    """The lease of a run folder. Processes stop writing to the MLflow run when a newer lease exists."""

    run_folder: str
    number: int
    storage: StorageConfig


@dataclass(frozen=True)
class TrackedRun:
    """Everything that a process needs to write to an MLflow run. It can be pickled."""

    uri: str
    run_id: str
    spool: str
    """Local folder that contains the journals."""
    lease: RunLease | None = None
    """Lease under which the process writes; None for a process that only adds its own results."""
    recreated: bool = False
    """Whether the MLflow run was created again and still lacks the run folder's points and evaluations."""

    def journal(self, writer: str) -> Path:
        """Return the journal file of a writer. Its name contains the lease, so successive holders share no file."""
        return Path(self.spool) / (f"{writer}-{self.lease.number}.jsonl" if self.lease else f"{writer}.jsonl")
