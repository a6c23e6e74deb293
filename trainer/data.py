"""Training data of a run: manifests, data order and the batches of this rank."""

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
    """Endless sequence of images; the same on all ranks."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the order. If it is equal for two runs, both see the same image at every position."""
        ...

    @property
    def max_segments(self) -> int:
        """Largest number of segments in any image."""
        ...

    def check(self, storage: Storage) -> None:
        """Raise StorageError if data that later steps need are missing. Only rank 0 calls it."""
        ...

    def steps(self, job: TrainJob, storage: Storage, spec: LoaderSpec, order_start: int) -> Generator[StepBatches]:
        """Yield one rank's steps endlessly; the sequence starts at position `order_start`."""
        ...


OpenData = Callable[[TrainJob, Storage], TrainingData]
"""Function that opens the data of a job; every rank calls it."""


@dataclass(frozen=True)
class ShardedData:
    """Data in shards, with the order of samples that the recipe defines."""

    manifests: tuple[Manifest, ...]
    order: Order

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the order; a run resumes its order only if this is unchanged."""
        return self.order.fingerprint

    @property
    def max_segments(self) -> int:
        """Largest number of segments in any image, from the manifests."""
        return max(int(manifest.num_segments.max()) for manifest in self.manifests)

    def check(self, storage: Storage) -> None:
        """Check that every shard exists and has the size in its manifest."""
        for manifest in self.manifests:
            manifest.check_shards(storage)

    def steps(self, job: TrainJob, storage: Storage, spec: LoaderSpec, order_start: int) -> Generator[StepBatches]:
        """Return the steps of the loader; closing the generator stops the loader."""
        order = OffsetOrder(self.order, order_start) if order_start else self.order
        return build_loader(self.manifests, order, job.data, storage, spec)


def open_shards(job: TrainJob, storage: Storage) -> ShardedData:
    """Load the manifests and build the order. Raises DataError, StorageError, or TrainingError for an invalid job."""
    if len(job.shards) != len(job.data.train):
        raise TrainingError(
            f"the job has {len(job.shards)} shard folders, but data.train has {len(job.data.train)} data sets; pass "
            "one folder per data set"
        )
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
    """Yield this rank's batches from `state.position` on, without the steps in `job.skipped`.

    Close the generator to stop the loader. `neighbors` are the ranks that share the machine's cache. With `pin`,
    batches are in pinned memory.

    Raises TrainingError if the position is not a multiple of the global batch.
    """
    global_batch, position = job.training.global_batch, state.position
    if position % global_batch:
        raise TrainingError(
            f"the run has consumed {position} images, not a multiple of training.global_batch ({global_batch}); "
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
    for first, count in unskipped_ranges(position, job.skipped, global_batch):
        with closing(data.steps(job, storage, replace(spec, start_step=first), state.order_start)) as steps:
            yield from islice(steps, count)


def unskipped_ranges(
    position: int, skipped: Sequence[PositionRange], global_batch: int
) -> list[tuple[int, int | None]]:
    """Return first step and number of steps of every stretch between skipped ranges; the last is endless (None)."""
    stretches: list[tuple[int, int | None]] = []
    for positions in sorted(skipped, key=lambda positions: positions.start):
        if positions.stop <= position:
            continue
        if positions.start > position:
            stretches.append((position // global_batch, (positions.start - position) // global_batch))
        position = positions.stop
    return [*stretches, (position // global_batch, None)]
