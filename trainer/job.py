"""What one rank needs to train, and how the outside asks it to end."""

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
    """Positions of the data order from `start` up to but not including `stop`, both between two steps."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"positions {self.start} to {self.stop - 1} of the data order"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run as one rank sees it; the same for all ranks. Picklable."""

    run_folder: str
    """Folder or `s3://` prefix; checkpoints go to `checkpoints/` in it."""
    model: ModelConfig
    """With `num_classes` set."""
    data: DataConfig
    shards: tuple[str, ...]
    """Folder or `s3://` prefix of the shards of every item of `data.train`, in its order."""
    training: TrainingConfig
    storage: StorageConfig = field(default_factory=StorageConfig)
    seed: int = 0
    recipe: str = ""
    """The resolved recipe (YAML), stored with every checkpoint."""
    identity: ModelIdentity | None = None
    """What the weights mean, stored with every checkpoint; None where only the ranks' tensors matter."""
    lease: int = 0
    """Number of the lease under which the run folder is written; 0 for a run that nobody else can know of."""
    attempt: str = ""
    """Names this start of the ranks in the run folder; empty where nobody supervises them."""
    evaluates: bool = False
    """Whether checkpoints are evaluated, and kept until they are."""
    evaluator_bytes: int = 0
    """What evaluation actors take of each rank's GPU, where they share it."""
    skipped: tuple[PositionRange, ...] = ()
    """What the run leaves out after loss spikes, as if the order did not have it."""

    @property
    def effective_identity(self) -> ModelIdentity | None:
        """The identity with the recipe as the run has it now."""
        return None if self.identity is None else replace(self.identity, recipe=self.recipe)

    def started_from(self, start: tuple[StartWeights, ...]) -> TrainJob:
        """The job with what its run began with in the identity of its checkpoints."""
        return self if self.identity is None else replace(self, identity=replace(self.identity, start=start))

    def with_micro_batch(self, size: int) -> TrainJob:
        """The job with another `training.micro_batch`, which its recipe names, too."""
        job = replace(self, training=replace(self.training, micro_batch=size))
        if not self.recipe:
            return job
        recipe = parse_yaml(self.recipe)
        recipe["training"]["micro_batch"] = size
        return replace(job, recipe=yaml.safe_dump(recipe, sort_keys=False, width=100))


class Control(Protocol):
    """Asked by rank 0. Before every step: stop and drain end the run after a checkpoint at the next step boundary."""

    def stop_requested(self) -> bool:
        """Whether the user wants the run to end."""
        ...

    def drain_requested(self) -> bool:
        """Whether a machine is about to go away; the run is meant to continue elsewhere."""
        ...


@dataclass
class ManualControl:
    """Control by attributes: for tests, and for runs that nobody interrupts."""

    stop: bool = False
    drain: bool = False

    def stop_requested(self) -> bool:
        """Whether `stop` was set."""
        return self.stop

    def drain_requested(self) -> bool:
        """Whether `drain` was set."""
        return self.drain
