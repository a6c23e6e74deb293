"""Which weights a verb means by `--checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import list_checkpoints


@dataclass(frozen=True)
class ChosenWeights:
    """A checkpoint of the run, or weights from elsewhere."""

    url: str
    """Checkpoint folder or file of weights."""
    step: int | None
    """Optimizer step; None where the weights are not a checkpoint of the run."""

    @property
    def name(self) -> str:
        """For folders and titles."""
        if self.step is not None:
            return f"step_{self.step:08d}"
        return self.url.rstrip("/").rpartition("/")[2].rpartition(".")[0] or "weights"


def choose_checkpoint(config: RunConfig, storage: Storage, wish: str | None) -> ChosenWeights:
    """The newest checkpoint of the run for None, that of a step for a number, else the path or URL itself.

    Raises:
        ConfigError: the run has no checkpoint, or none of that step; a local path where nothing is.
    """
    if wish is not None and not wish.isdecimal():
        if "://" not in wish and not Path(wish).exists():
            raise ConfigError(f"--checkpoint {wish}: there is no such file or folder")
        return ChosenWeights(wish, None)
    found = list_checkpoints(storage, config.run_folder)
    if not found:
        raise ConfigError(
            f"{config.run_folder} has no checkpoint; train first, or give --checkpoint the path of a file of weights"
        )
    if wish is None:
        return ChosenWeights(found[0].url, found[0].step)
    for checkpoint in found:
        if checkpoint.step == int(wish):
            return ChosenWeights(checkpoint.url, checkpoint.step)
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise ConfigError(f"{config.run_folder} has no checkpoint of step {wish}; there are {steps}")
