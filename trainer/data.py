"""The training data of a run: manifests, order and this rank's batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from m2f.data_pipeline.loading.loader import LoaderSpec, StepBatches, build_loader
from m2f.data_pipeline.order.order import OffsetOrder, Order, build_order
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.errors import TrainingError
from m2f.trainer.job import PositionRange, TrainJob
from m2f.trainer.state import TrainState


class TrainingData(Protocol):
    """An endless sequence of images, the same on all ranks."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when two runs see the same image at every position."""
        ...

    @property
    def most_segments(self) -> int:
        """Of any image."""
        ...

    def check(self, storage: Storage) -> None:
        """Raise StorageError where something is missing that steps will want. Only rank 0 calls it."""
        ...

    def steps(self, job: TrainJob, storage: Storage, spec: LoaderSpec, order_start: int) -> Generator[StepBatches]:
        """One rank's endless steps; the sequence begins at position `order_start`."""
        ...


OpenData = Callable[[TrainJob, Storage], TrainingData]
"""Opens the data of a job on every rank."""


@dataclass(frozen=True)
class ShardedData:
    """Shards, in the order that the recipe gives them."""

    manifests: tuple[Manifest, ...]
    order: Order

    @property
    def fingerprint(self) -> str:
        """Of the order."""
        return self.order.fingerprint

    @property
    def most_segments(self) -> int:
        """By the manifests."""
        return max(int(manifest.num_segments.max()) for manifest in self.manifests)

    def check(self, storage: Storage) -> None:
        """Every shard is there and has its size."""
        for manifest in self.manifests:
            manifest.check_shards(storage)

    def steps(self, job: TrainJob, storage: Storage, spec: LoaderSpec, order_start: int) -> Generator[StepBatches]:
        """From the loader."""
        order = OffsetOrder(self.order, order_start) if order_start else self.order
        return build_loader(self.manifests, order, job.data, storage, spec)


def open_shards(job: TrainJob, storage: Storage) -> ShardedData:
    """Load the manifests and build the order. Raises DataError, StorageError, and TrainingError for a wrong job."""
    if len(job.shards) != len(job.data.train):
        raise TrainingError(f"{len(job.shards)} shard folders for {len(job.data.train)} data sets in data.train")
    manifests = tuple(Manifest.load(url, storage) for url in job.shards)
    return ShardedData(manifests, build_order(manifests, job.seed, job.data))


def open_batches(
    job: TrainJob,
    data: TrainingData,
    storage: Storage,
    state: TrainState,
    rank: int,
    neighbors: tuple[int, ...],
    *,
    pin: bool = False,
) -> Generator[StepBatches]:
    """This rank's batches from where the run is, without the steps of `job.skipped`; close it to stop the loader.

    `neighbors` share its machine's cache. With `pin` batches are in pinned memory.

    Raises TrainingError where the global batch does not divide the position.
    """
    global_batch, position = job.training.global_batch, state.position
    if position % global_batch:
        raise TrainingError(
            f"the run has consumed {position} images, which training.global_batch ({global_batch}) does not divide; "
            "keep the global batch of the checkpoint"
        )
    spec = LoaderSpec(
        global_batch=global_batch,
        micro_batch=job.training.micro_batch,
        rank=rank,
        world=state.world_size,
        start_step=position // global_batch,
        seed=job.seed,
        local_ranks=neighbors,
        pin=pin,
    )
    for first, count in unskipped(position, job.skipped, global_batch):
        with closing(data.steps(job, storage, replace(spec, start_step=first), state.order_start)) as steps:
            yield from islice(steps, count)


def unskipped(position: int, skipped: Sequence[PositionRange], global_batch: int) -> list[tuple[int, int | None]]:
    """First step and number of steps of every stretch between the skipped ranges; the last one has no end (None)."""
    stretches: list[tuple[int, int | None]] = []
    for positions in sorted(skipped, key=lambda positions: positions.start):
        if positions.stop <= position:
            continue
        if positions.start > position:
            stretches.append((position // global_batch, (positions.start - position) // global_batch))
        position = positions.stop
    return [*stretches, (position // global_batch, None)]
