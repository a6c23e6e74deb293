"""Loader of batches in a given order: this process fetches, worker processes decode and augment.

The loader has no state that a checkpoint must store. A loader that starts at step s yields exactly the batches that an
uninterrupted loader yields from that step, with any number of workers. Prefetched batches are discarded at a restart.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, tee
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import DataConfig, Shrink
from m2f.data_pipeline.errors import DataError, LoaderDiedError
from m2f.data_pipeline.loading.chunk_cache import ChunkCache, UpcomingChunks
from m2f.data_pipeline.loading.decode import (
    BatchResult,
    MicroBatchDataset,
    RawBatch,
    RawExample,
    SubstituteFinder,
    Substitution,
    resolve_batch,
)
from m2f.data_pipeline.loading.fetch import FetchLimits, Members, RawSample, SampleFetcher
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import Order, SampleRef, chunk_bytes, look_ahead, step_positions
from m2f.data_pipeline.shards.codec import decode
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import (
    FILLER_POSITION,
    Batch,
    EvalBatch,
    collate_eval,
    padded_eval_size,
    show_image_in_fillers,
)
from m2f.data_pipeline.transforms.copy_paste import partner_position
from m2f.data_pipeline.transforms.example import TrainTransform
from m2f.model.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")

_EVAL_HORIZON = 20_000
"""Number of samples known ahead in an evaluation. It bounds memory and start-up time, like `look_ahead` in training."""
_EVAL_CHUNK_BYTES = 4_000_000
"""Bytes of one ranged read; the default of data.chunk_mb."""
_EVAL_BATCHES_AHEAD = 2
"""Batches whose reads are started before they are needed: one is being decoded, one is being read."""


@dataclass(frozen=True)
class StepBatches:
    """The batches of one rank for one optimizer step."""

    step: int
    micro_batches: tuple[Batch, ...]
    positions: tuple[int, ...]
    """Positions of the order that this rank has in this step, without fillers."""
    wait_s: float
    """Seconds that the caller waited for the data of this step."""
    substitutions: tuple[Substitution, ...] = ()
    """Bad samples of this step and their substitutes."""


@dataclass(frozen=True)
class LoaderSpec:
    """The part of the work that one rank loads."""

    global_batch: int
    """Number of images in a step over all ranks, without fillers."""
    micro_batch: int
    """Largest number of images in a micro-batch; see `step_positions`."""
    rank: int
    world: int
    start_step: int
    """Number of completed steps, which is the first step to load."""
    seed: int
    """Seed of the augmentation."""
    local_ranks: tuple[int, ...] = ()
    """Ranks on this machine, which share a cache. Empty means only this rank."""
    pin: bool = False
    """Whether to return batches in pinned memory, for asynchronous copies to a GPU. Batches with substitutes are not
    pinned."""

    def positions(self, step: int) -> tuple[tuple[int | None, ...], ...]:
        """Return this rank's positions of a step, grouped by micro-batch. None is a filler."""
        return step_positions(step, self.global_batch, self.rank, self.world, self.micro_batch)

    @property
    def micro_batches_per_step(self) -> int:
        """Return the number of micro-batches in each step."""
        return len(self.positions(0))


def build_loader(
    manifests: Sequence[Manifest], order: Order, data: DataConfig, storage: Storage, spec: LoaderSpec
) -> Generator[StepBatches]:
    """Return an endless generator of one rank's batches from `spec.start_step` on.

    Close the generator to stop its threads and processes.

    Raises:
        DataError: the category tables of the data sets contradict each other, copy-paste has no things to paste, or a
            sample is damaged.
        LoaderDiedError: a loader process died.
        StorageError: a shard cannot be read.
    """
    things = _thing_labels(manifests[0], data)
    transforms = [
        TrainTransform(
            task=data.task,
            labels=labels,
            augment=data.augment,
            drop_empty_targets=data.drop_empty_targets,
            seed=spec.seed,
            things=things,
            rasterise=data.rasterise,
            crop_padding=data.crop_padding,
        )
        for labels in mixture_labels(manifests, data.task)
    ]
    return _steps(manifests, order, data, storage, spec, transforms)


def _thing_labels(manifest: Manifest, data: DataConfig) -> frozenset[int]:
    classes = manifest.categories.for_task(data.task)
    things = frozenset(label for label, category in enumerate(classes) if category.is_thing)
    if data.copy_paste is not None and not things:
        raise DataError(f"{manifest.url}: no class is a thing, so data.copy_paste has nothing to paste; remove it")
    return things


def mixture_labels(manifests: Sequence[Manifest], task: Task) -> list[dict[int, int]]:
    """Return the mapping from source id to class for each data set of a mixture.

    The table of the first data set defines the classes. The others may have other ids, another order, or only some of
    the classes. Classes with the same name are told apart by their order, if both tables have the same names.

    Raises:
        DataError: a data set has a class that the first one lacks, or that is a thing in one and stuff in the other, or
            a name that the first one repeats.
    """
    first = manifests[0]
    return [first.categories.labels(task), *(_labels_in(first, other, task) for other in manifests[1:])]


def _labels_in(first: Manifest, other: Manifest, task: Task) -> dict[int, int]:
    """Return the mapping from the ids of `other` to the classes of `first`. Raises DataError as `mixture_labels`."""
    known_classes, classes = ([(c.name, c.is_thing) for c in m.categories.for_task(task)] for m in (first, other))
    if known_classes == classes:
        return other.categories.labels(task)
    if unknown := [name for name, is_thing in classes if (name, is_thing) not in known_classes]:
        raise DataError(
            f"the first data set of a mixture defines the classes, but {first.url} does not have {unknown[:5]} of "
            f"{other.url} (matched by name and by thing or stuff); list the one with all classes first, or shard "
            "them with the same categories"
        )
    if repeated := [name for name, is_thing in classes if known_classes.count((name, is_thing)) > 1]:
        raise DataError(
            f"{first.url} has several classes named {repeated[0]!r}, so that of {other.url} cannot be matched by name; "
            "rename them, or shard both data sets with the same categories"
        )
    return {c.id: known_classes.index((c.name, c.is_thing)) for c in other.categories.for_task(task)}


def eval_batches(
    manifest: Manifest,
    groups: Sequence[Sequence[int]],
    storage: Storage,
    *,
    shortest_edge: int,
    max_size: int,
    shrink: Shrink = "area",
    square: bool = False,
) -> Generator[EvalBatch]:
    """Yield one batch for each group of rows of a manifest (see `eval_groups`). One batch is prepared ahead.

    `collate_eval` explains `shortest_edge`, `max_size`, `shrink` and `square`.

    Raises:
        DataError: a sample is damaged.
        StorageError: a shard cannot be read.
    """
    rows = [tuple(int(i) for i in group) for group in groups]
    refs = (tuple(SampleRef(0, 0, index) for index in group) for group in rows)
    chunks = group_chunks(manifest.shard, manifest.offset, _EVAL_CHUNK_BYTES)
    limits = FetchLimits(groups_ahead=_EVAL_BATCHES_AHEAD, horizon=_EVAL_HORIZON // max(map(len, rows), default=1))

    def make_batch(fetched: tuple[tuple[int, ...], tuple[RawSample | None, ...]]) -> EvalBatch:
        group, raw = fetched
        samples = [decode(_members(sample)) for sample in raw]
        return collate_eval(samples, group, shortest_edge, max_size, shrink, square)

    with closing(SampleFetcher([manifest], [chunks], storage, refs, limits)) as fetcher:
        yield from map_in_thread(make_batch, zip(rows, fetcher, strict=True), ahead=1)


def eval_groups(
    manifest: Manifest,
    indices: Sequence[int],
    *,
    batch_size: int,
    shortest_edge: int,
    max_size: int,
    square: bool = False,
) -> list[tuple[int, ...]]:
    """Group rows whose images have the same size after resizing and padding, up to `batch_size` rows per group.

    The padding of an image therefore depends only on its own size, not on the batch size. Rows of one size keep their
    order, and groups are in the order of their first rows.
    """
    open_groups: dict[tuple[int, int], list[int]] = {}
    groups: list[list[int]] = []
    for index in map(int, indices):
        size = int(manifest.height[index]), int(manifest.width[index])
        padded = padded_eval_size(size, shortest_edge, max_size, square)
        group = open_groups.setdefault(padded, [])
        if not group:
            groups.append(group)
        group.append(index)
        if len(group) == batch_size:
            del open_groups[padded]
    return [tuple(group) for group in groups]


def _members(sample: RawSample | None) -> Members:
    assert sample is not None, "evaluation has no fillers"
    if isinstance(sample.members, DataError):
        raise sample.members
    return sample.members


def _steps(
    manifests: Sequence[Manifest],
    order: Order,
    data: DataConfig,
    storage: Storage,
    spec: LoaderSpec,
    transforms: Sequence[TrainTransform],
) -> Generator[StepBatches]:
    ahead = data.prefetch_steps * spec.micro_batches_per_step
    dataset = MicroBatchDataset(transforms)
    substitutes = SubstituteFinder(manifests, order, storage, dataset) if data.max_bad_samples else None
    with (
        closing(_raw_batches(manifests, order, data, storage, spec, ahead)) as raw_batches,
        closing(_results(dataset, raw_batches, data.workers, ahead, spec.pin)) as results,
    ):
        for step in count(spec.start_step):
            start_time = time.perf_counter()
            resolved = [resolve_batch(next(results), substitutes) for _ in range(spec.micro_batches_per_step)]
            batches = tuple(batch for batch, _ in resolved)
            show_image_in_fillers(batches)
            substitutions = tuple(
                substitution for _, batch_substitutions in resolved for substitution in batch_substitutions
            )
            positions = tuple(p for batch in batches for p in batch.targets.position.tolist() if p != FILLER_POSITION)
            yield StepBatches(step, batches, positions, time.perf_counter() - start_time, substitutions)


def _raw_batches(
    manifests: Sequence[Manifest], order: Order, data: DataConfig, storage: Storage, spec: LoaderSpec, ahead: int
) -> Generator[RawBatch | UserError]:
    """Yield micro-batches before decoding. An error is yielded in place of a micro-batch and ends the generator."""
    micro_batches, fetch_positions = tee(
        positions for step in count(spec.start_step) for positions in spec.positions(step)
    )
    # Reads start well before a micro-batch is due. A micro-batch that waits for its bytes delays all later ones.
    horizon = look_ahead(data, spec.world)
    chunks = [group_chunks(m.shard, m.offset, chunk_bytes(data)) for m in manifests]
    upcoming = UpcomingChunks(manifests, chunks, order, spec.world, spec.local_ranks or (spec.rank,))
    fetcher = SampleFetcher(
        manifests,
        chunks,
        storage,
        map(partial(_sample_refs, order=order, data=data, seed=spec.seed), fetch_positions),
        FetchLimits(groups_ahead=2 * ahead, horizon=max(horizon // len(spec.positions(0)[0]), 2 * ahead + 1)),
        None if data.cache is None else ChunkCache(data.cache, storage.counters, upcoming),
    )
    with closing(fetcher):
        for positions in micro_batches:
            upcoming.position = next((p for p in positions if p is not None), upcoming.position)
            try:
                fetched = next(fetcher)
            except UserError as error:
                yield error
                return
            size = len(positions)
            yield tuple(map(_raw_example, positions, fetched[:size], fetched[size:]))


def _sample_refs(
    positions: Sequence[int | None], order: Order, data: DataConfig, seed: int
) -> tuple[SampleRef | None, ...]:
    """Return the samples at all positions, followed by those whose objects are pasted onto them.

    None stands for a filler or for a missing partner.
    """
    partners = [None if p is None else partner_position(p, seed, data) for p in positions]
    return tuple(None if p is None else order.at(p) for p in (*positions, *partners))


def _raw_example(position: int | None, base: RawSample | None, partner: RawSample | None) -> RawExample | None:
    if position is None:
        return None
    assert base is not None
    return RawExample(position, base, partner)


def _results(
    dataset: MicroBatchDataset, raw_batches: Iterator[RawBatch | UserError], workers: int, ahead: int, pin: bool
) -> Generator[BatchResult]:
    """Yield the results of `raw_batches` in their order. The thread that makes or receives a batch also pins it."""

    def make_result(raw: RawBatch | UserError) -> BatchResult:
        result = dataset[raw]
        return result.pin_memory() if pin and isinstance(result, Batch) else result

    if not workers:
        yield from map_in_thread(make_result, raw_batches, ahead)
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_RawBatchSampler(raw_batches),
        num_workers=workers,
        collate_fn=_identity,
        prefetch_factor=max(1, -(-ahead // workers)),
        pin_memory=pin,
        multiprocessing_context=_worker_context(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its seed is not used, but the default would advance the trainer's generator
    )
    try:
        for result in loader:
            yield tuple(result) if isinstance(result, list) else result  # pinning may turn tuples into lists
    except (RuntimeError, EOFError, OSError) as error:
        # OSError and EOFError: the process died after it sent a batch and before it passed on the shared memory.
        if isinstance(error, RuntimeError) and not re.search("exited unexpectedly|killed by signal", str(error)):
            raise
        raise LoaderDiedError(
            f"a loader process died ({error!r}). Usually memory or /dev/shm is too small: lower data.workers or "
            "data.prefetch_steps, or increase the container's memory or /dev/shm"
        ) from error


class _RawBatchSampler(Sampler[RawBatch | UserError]):
    """Passes raw batches to the DataLoader as if they were indices."""

    def __init__(self, raw_batches: Iterator[RawBatch | UserError]) -> None:
        self._raw_batches = raw_batches

    def __iter__(self) -> Iterator[RawBatch | UserError]:
        return self._raw_batches


def _identity(batch: Any) -> Any:
    return batch


def _worker_context() -> BaseContext:
    # forkserver, because fork must not copy the threads and CUDA state of the training process. The server imports
    # this module once, so that workers start fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(_: int) -> None:
    # A terminal sends SIGINT to all processes, but only the trainer decides: it still needs batches until it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the training process exits, even if it is killed.

    torch's own check would not notice, because it watches the fork server, which lives as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def map_in_thread(function: Callable[[In], Out], items: Iterator[In], ahead: int) -> Generator[Out]:
    """Yield the results of `map(function, items)`. One thread prepares up to `ahead` of them.

    The caller's thread advances `items`.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prepare", initializer=cv2.setNumThreads, initargs=(0,))
    pending: deque[Future[Out]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
