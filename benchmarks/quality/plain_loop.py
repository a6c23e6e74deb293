"""Train the Mask2Former of `transformers` with its own losses, in a plain loop over batches of our loader."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.quality.plain_step import PlainStep
from benchmarks.quality.transformers_model import to_our_names, transformers_loss, transformers_twin
from benchmarks.quality.transformers_run import WEIGHTS
from m2f.cluster.terminal import print_out
from m2f.data_pipeline.loading.loader import LoaderSpec, StepBatches
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.errors import ConfigError
from m2f.trainer.data import open_shards
from m2f.trainer.job import Control, TrainJob
from m2f.trainer.start_model import start_model

CHECKPOINT = "checkpoint.pt"


def run_plain_loop(job: TrainJob, control: Control) -> None:
    """Train from the checkpoint in the run folder, or else from the initial weights of our trainer.

    A checkpoint is written every `training.checkpoint.every_steps` steps, and when `control` requests a stop. After the
    last step, the weights are written under our names. Raises ConfigError for settings that the peer does not support.
    """
    training = job.training
    if training.settled_precision != "fp32" or training.micro_batch < training.global_batch:
        raise ConfigError(
            f"training.precision is {training.precision} and training.micro_batch {training.micro_batch}; training "
            f"transformers requires fp32 and a micro-batch of training.global_batch, which is {training.global_batch}"
        )
    folder = Path(job.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    loop = _Loop(job, folder)
    with closing(loop.open_batches()) as batches:
        while loop.steps_done < training.max_steps:
            if control.stop_requested():
                loop.save()
                return
            (batch,) = next(batches).micro_batches
            loss = loop.step(batch)
            if loop.steps_done % training.log_every_steps == 0:
                print_out(f"step {loop.steps_done}/{training.max_steps}  loss {loss:.4f}")
            if loop.steps_done % training.checkpoint.every_steps == 0:
                loop.save()
    loop.save_weights()


class _Loop:
    """Model and optimizer state of a training run, which resumes from the checkpoint if there is one."""

    def __init__(self, job: TrainJob, folder: Path) -> None:
        self._job, self._folder, self._storage = job, folder, Storage(job.storage)
        self._ours, _ = start_model(job, self._storage, None)
        self._peer = transformers_twin(self._ours, job.model).train()
        self._update = PlainStep(self._peer, job.training)
        self.steps_done = 0
        torch.manual_seed(job.seed)  # the peer draws its loss points from torch's generator
        path = folder / CHECKPOINT
        if path.exists():
            state = torch.load(path, weights_only=True)
            self._peer.load_state_dict(state["model"])
            self._update.load(state["update"])
            torch.set_rng_state(state["random"])
            self.steps_done = state["step"]
            print_out(f"resumed after step {self.steps_done}")

    def open_batches(self) -> Generator[StepBatches]:
        """Return the batches of the remaining steps; one batch is one step."""
        batch = self._job.training.global_batch
        spec = LoaderSpec(
            global_batch=batch, micro_batch=batch, rank=0, world=1, start_step=self.steps_done, seed=self._job.seed
        )
        return open_shards(self._job, self._storage).steps(self._job, self._storage, spec, order_start=0)

    def step(self, batch: Batch) -> float:
        """Train on one batch and return its loss."""
        loss = transformers_loss(self._peer, self._ours.normalise(batch.images, batch.sizes), batch.targets)
        self._update(loss, self.steps_done)
        self.steps_done += 1
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint, replacing the previous one atomically."""
        state = {
            "step": self.steps_done,
            "model": self._peer.state_dict(),
            "update": self._update.state(),
            "random": torch.get_rng_state(),
        }
        temporary = self._folder / f"{CHECKPOINT}.new"
        torch.save(state, temporary)
        os.replace(temporary, self._folder / CHECKPOINT)

    def save_weights(self) -> None:
        """Write the weights under our names; if the recipe keeps a moving average, write the average instead."""
        weights = {name: tensor.detach().contiguous() for name, tensor in to_our_names(self._update.weights()).items()}
        temporary = self._folder / f"{WEIGHTS}.new"
        save_file(weights, temporary)
        os.replace(temporary, self._folder / WEIGHTS)
