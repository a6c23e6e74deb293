"""Predict read costs before anything is read, by simulating one epoch of the order on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.config import AugmentConfig, DataConfig, LargeScaleJitter, ScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.order.chunks import Chunks, group_chunks
from m2f.data_pipeline.order.order import Order, chunk_bytes, look_ahead
from m2f.data_pipeline.order.selection import select
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.transforms.copy_paste import partner_position
from m2f.model.format_count import format_count

_BYTES_PER_PIXEL = 4  # three colours and one layer of ids


@dataclass(frozen=True, kw_only=True)
class SimulatedRanks:
    """Number, batch size and speed of the simulated ranks."""

    world: int
    """Number of ranks on all machines."""
    per_machine: int
    """Number of ranks on each machine."""
    batch: int
    """Images per rank and optimizer step."""
    images_per_s: float
    """Speed of one rank in images per second."""


@dataclass(frozen=True, kw_only=True)
class ReadCosts:
    """Read costs of one epoch of all data sets. Numbers are totals of all ranks unless stated otherwise."""

    images: int
    """Images in the epoch, repeats included."""
    chunks: int
    """Chunks with at least one of these images."""
    chunk_bytes: int
    """Size of these chunks in bytes, which is the size of a cache that holds everything."""
    reads: int
    """Ranged reads of all ranks without a cache."""
    read_bytes: int
    """Bytes of these reads."""
    cached_reads: int
    """Reads of all machines in the first epoch with a sufficiently large cache."""
    machine_bytes: int
    """Bytes of the chunks that the busiest machine reads in the epoch; each chunk is counted once."""
    fetched_peak: int
    """Largest number of bytes of samples that one rank holds between their read and their use."""
    batch_bytes: int
    """Bytes of decoded images in the queue and the workers of one rank."""


def simulate_reads(
    manifests: Sequence[Manifest], order: Order, data: DataConfig, seed: int, ranks: SimulatedRanks
) -> ReadCosts:
    """Simulate one epoch: the positions from 0, as many as all data sets together have samples in an epoch.

    The time is proportional to the number of samples: COCO takes 0.3 s, or 2 s with copy-paste.
    """
    count = sum(
        select(manifest, item, data, seed, dataset).total(1)
        for dataset, (manifest, item) in enumerate(zip(manifests, data.train, strict=True))
    )
    chunks = [group_chunks(manifest.shard, manifest.offset, chunk_bytes(data)) for manifest in manifests]
    needed = _sample_reads(manifests, chunks, order, _needed_positions(count, seed, data))
    rank = needed.time % ranks.world
    read, sample_order = _group_reads(needed, rank, horizon=look_ahead(data, ranks.world) * ranks.world)
    start, end = needed.offset[sample_order], needed.offset[sample_order] + needed.length[sample_order]
    sizes = _chunk_sizes(manifests, chunks)
    used = np.unique(needed.chunk)
    by_machine = np.unique(np.stack([rank // ranks.per_machine, needed.chunk]), axis=1)
    return ReadCosts(
        images=count,
        chunks=len(used),
        chunk_bytes=int(sizes[used].sum()),
        reads=len(read),
        read_bytes=int((np.maximum.reduceat(end, read) - np.minimum.reduceat(start, read)).sum()),
        cached_reads=by_machine.shape[1],
        machine_bytes=int(np.bincount(by_machine[0], sizes[by_machine[1]]).max()),
        fetched_peak=_peak_bytes(needed, rank, read, sample_order),
        batch_bytes=_batch_bytes(data, ranks.batch),
    )


def format_read_costs(costs: ReadCosts, ranks: SimulatedRanks) -> str:
    """Return the costs as a text of several lines."""
    speed = ranks.world * ranks.images_per_s
    per_image, machines = costs.reads / costs.images, -(-ranks.world // ranks.per_machine)
    rate = costs.read_bytes / costs.images * speed / 1e6
    memory = costs.fetched_peak + costs.batch_bytes
    lines = [
        f"{format_count(ranks.world, 'rank')} with {format_count(ranks.batch, 'image')} each on "
        f"{format_count(machines, 'machine')}, {speed:,.0f} images/s in total",
        f"epoch         {format_count(costs.images, 'image')} in {format_count(costs.chunks, 'chunk')}, "
        f"{costs.chunk_bytes / 1e9:,.2f} GB, "
        f"{costs.images / speed / 60:,.1f} minutes",
        f"reads         {costs.reads / costs.chunks:.2f} per chunk, {per_image * speed:,.1f} requests/s, "
        f"{rate:,.1f} MB/s ({rate / machines:,.1f} MB/s per machine)",
        f"with a cache  {costs.cached_reads / costs.chunks:.2f} reads per chunk in the first epoch; none later if "
        f"data.cache.max_gb is {costs.chunk_bytes / 1e9:,.2f} or more (a machine reads "
        f"{costs.machine_bytes / 1e9:,.2f} GB per epoch)",
        f"memory        {memory / 1e6:,.0f} MB per rank: {costs.fetched_peak / 1e6:,.0f} MB of files, "
        f"{costs.batch_bytes / 1e6:,.0f} MB of batches",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _SampleReads:
    """Columns with one entry per needed sample. Chunks are numbered consecutively over all data sets."""

    time: np.ndarray
    """Position of the image that needs the sample."""
    chunk: np.ndarray
    offset: np.ndarray
    length: np.ndarray


def _needed_positions(count: int, seed: int, data: DataConfig) -> np.ndarray:
    """Return [2, n]: positions of images, and positions of the samples that they need.

    An image needs its own sample and, with copy-paste, the sample whose objects it receives.
    """
    image_positions = np.stack([np.arange(count)] * 2)
    if data.copy_paste is None:
        return image_positions
    partners = ((position, partner_position(position, seed, data)) for position in range(count))
    pasted = np.array([pair for pair in partners if pair[1] is not None], dtype=np.int64).reshape(-1, 2)
    return np.concatenate([image_positions, pasted.T], axis=1)


def _sample_reads(
    manifests: Sequence[Manifest], chunks: Sequence[Chunks], order: Order, needed: np.ndarray
) -> _SampleReads:
    time, positions = needed
    refs = order.refs(0, int(positions.max()) + 1)
    datasets, rows = refs.dataset[positions], refs.index[positions]
    chunk, offset, length = (np.empty(len(time), dtype=np.int64) for _ in range(3))
    num_earlier_chunks = 0
    for dataset, (manifest, dataset_chunks) in enumerate(zip(manifests, chunks, strict=True)):
        in_dataset = datasets == dataset
        index = rows[in_dataset]
        chunk[in_dataset] = num_earlier_chunks + dataset_chunks.chunk_of[index]
        offset[in_dataset], length[in_dataset] = manifest.offset[index], manifest.length[index]
        num_earlier_chunks += len(dataset_chunks.shard)
    return _SampleReads(time, chunk, offset, length)


def _group_reads(needed: _SampleReads, rank: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each read in the sorted samples, and the samples sorted by rank, chunk and time.

    A rank reads a chunk again if its next use of the chunk is more than `horizon` positions later.
    """
    sample_order = np.lexsort((needed.time, needed.chunk, rank))
    chunk, owner_rank = needed.chunk[sample_order], rank[sample_order]
    starts_read = np.ones(len(sample_order), dtype=bool)
    starts_read[1:] = (
        (np.diff(chunk) != 0) | (np.diff(owner_rank) != 0) | (np.diff(needed.time[sample_order]) > horizon)
    )
    return np.flatnonzero(starts_read), sample_order


def _peak_bytes(needed: _SampleReads, rank: np.ndarray, read: np.ndarray, sample_order: np.ndarray) -> int:
    """Return the largest number of bytes that a rank holds.

    A rank holds a sample from the first use of its chunk, when the sample is read, until its own use.
    """
    first = np.repeat(needed.time[sample_order[read]], np.diff(np.append(read, len(sample_order))))
    time = np.concatenate([first, needed.time[sample_order]])
    change = np.concatenate([needed.length[sample_order], -needed.length[sample_order]])
    # The changes of each rank add up to 0, so one running sum over all ranks suffices.
    events = np.lexsort((change < 0, time, np.tile(rank[sample_order], 2)))
    return int(np.cumsum(change[events]).max())


def _chunk_sizes(manifests: Sequence[Manifest], chunks: Sequence[Chunks]) -> np.ndarray:
    return np.concatenate(
        [
            np.add.reduceat(manifest.length[dataset_chunks.samples], dataset_chunks.bounds[:-1])
            for manifest, dataset_chunks in zip(manifests, chunks, strict=True)
        ]
    )


def _batch_bytes(data: DataConfig, batch: int) -> int:
    """Return the bytes of decoded images in the queue of one rank and in its workers."""
    return (data.prefetch_steps + data.workers + 1) * batch * _pixels(data.augment) * _BYTES_PER_PIXEL


def _pixels(augment: AugmentConfig) -> int:
    match augment:
        case LargeScaleJitter(size=size):
            return size * size
        case ShortestEdgeCrop(crop=(height, width)):
            return height * width
        case ScaleJitter(shortest_edges=edges, max_size=longest):
            return max(edges) * longest
