"""Inputs of one training rank, and the interface through which others ask it to end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import yaml

from m2f.data_pipeline.config import DataConfig, StorageConfig
from m2f.data_pipeline.documents import parse_yaml
from m2f.model.config import ModelConfig
from m2f.trainer.checkpoint.identity import ModelIdentity, StartWeights
from m2f.trainer.config import TrainingConfig


@dataclass(frozen=True)
class PositionRange:
    """Positions `start` to `stop` - 1 of the data order; both limits are multiples of the global batch."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"positions {self.start} to {self.stop - 1} of the data order"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run, as passed to every rank. Picklable."""

    run_folder: str
    """Folder or `s3://` prefix. Checkpoints go to its subfolder `checkpoints/`."""
    model: ModelConfig
    """Model settings, with `num_classes` set."""
    data: DataConfig
    shards: tuple[str, ...]
    """Shard folder or `s3://` prefix of every item of `data.train`, in the same order."""
    training: TrainingConfig
    storage: StorageConfig = field(default_factory=StorageConfig)
    seed: int = 0
    recipe: str = ""
    """The resolved recipe (YAML), stored with every checkpoint."""
    identity: ModelIdentity | None = None
    """Classes, task and input of the model, stored with every checkpoint; None if only the tensors matter."""
    lease: int = 0
    """Number of the lease under which the run folder is written; 0 for a run whose folder no other process uses."""
    attempt: str = ""
    """Name of this attempt (one start of the ranks) in the run folder; empty without a supervisor."""
    evaluates: bool = False
    """Whether checkpoints are evaluated, and kept until their evaluation ends."""
    evaluator_bytes: int = 0
    """Bytes of each rank's GPU that evaluation actors use; 0 if they do not share it."""
    skipped: tuple[PositionRange, ...] = ()
    """Positions that the run skips after loss spikes, as if they were not part of the order."""

    @property
    def effective_identity(self) -> ModelIdentity | None:
        """The identity with the current recipe of the run."""
        return None if self.identity is None else replace(self.identity, recipe=self.recipe)

    def with_start_weights(self, start: tuple[StartWeights, ...]) -> TrainJob:
        """Return the job with `start` in the identity of its checkpoints."""
        return self if self.identity is None else replace(self, identity=replace(self.identity, start=start))

    def with_micro_batch(self, size: int) -> TrainJob:
        """Return the job with `size` as `training.micro_batch`, in its recipe too."""
        job = replace(self, training=replace(self.training, micro_batch=size))
        if not self.recipe:
            return job
        recipe = parse_yaml(self.recipe)
        recipe["training"]["micro_batch"] = size
        return replace(job, recipe=yaml.safe_dump(recipe, sort_keys=False, width=100))


class Control(Protocol):
    """Stop and drain requests, polled by rank 0 before every step. On either, the run saves a checkpoint and ends."""

    def stop_requested(self) -> bool:
        """Return whether the user wants the run to end."""
        ...

    def drain_requested(self) -> bool:
        """Return whether a machine is about to go away, so that the run should continue elsewhere."""
        ...


@dataclass
class ManualControl:
    """Control through attributes, for tests and for runs that are never interrupted."""

    stop: bool = False
    drain: bool = False

    def stop_requested(self) -> bool:
        """Return whether `stop` was set."""
        return self.stop

    def drain_requested(self) -> bool:
        """Return whether `drain` was set."""
        return self.drain
