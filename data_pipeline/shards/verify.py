"""Verify a data set: its manifest, and either the sizes of its shards or every byte of them.

Each fault names the object and the remedy, and the sample and byte if known. Verification continues after a fault.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.readers.custom import check_annotation
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.columns import SAMPLES_FILE
from m2f.data_pipeline.shards.faults import Fault, parse_fault
from m2f.data_pipeline.shards.manifest import DATASET_FILE, Manifest, category_columns
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.data_pipeline.storage.stream import ObjectStream
from m2f.model.format_count import format_count

Depth = Literal["quick", "full"]
OnProgress = Callable[[int, int], None]
"""Callback with the numbers of samples checked and bytes read since the last call; runs in the caller's thread."""

_REWRITE_REMEDY = "copy the shard again from an intact copy, or delete the data set and write it again (m2f shard)"
_PROGRESS_INTERVAL_S = 0.5
"""Seconds between checks for progress while shards are read, at most."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Faults that `verify` found in a data set, and what it checked."""

    url: str
    depth: Depth
    num_samples: int
    """Number of samples in the manifest; 0 if the manifest cannot be read."""
    num_shards: int
    num_bytes: int
    """Size of all shards according to the manifest."""
    faults: tuple[Fault, ...]

    @property
    def passed(self) -> bool:
        """Return whether no fault was found."""
        return not self.faults


def verify(
    url: str,
    storage: Storage,
    depth: Depth,
    threads: int = 1,
    on_start: Callable[[Manifest], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Verify a data set. Faults are returned, not raised.

    Args:
        url: folder or `s3://` prefix with `dataset.json`.
        storage: storage of the data set.
        depth: `quick` checks the consistency of the manifest and the sizes in the store. `full` reads every byte and
            also checks the SHA-256 of shards, and crc32, tar members, decoding and labels of samples.
        threads: number of shards that are read concurrently.
        on_start: called with the manifest before the first shard is checked.
        on_progress: called with the numbers of samples and bytes as they are checked.
    """
    try:
        manifest = Manifest.load(url, storage)
    except (DataError, StorageError) as error:
        fault = parse_fault(join(url, DATASET_FILE), str(error))
        return Verification(url=url, depth=depth, num_samples=0, num_shards=0, num_bytes=0, faults=(fault,))
    if on_start is not None:
        on_start(manifest)
    try:
        faults = list(_check_rows(manifest))
    except DataError as error:  # from a column that is decoded on first use
        faults = [parse_fault(join(url, SAMPLES_FILE), str(error))]
    if not faults:  # inconsistent rows cannot be compared with shards
        shards = range(len(manifest.shards))
        with ThreadPoolExecutor(threads) as pool:
            counts: list[tuple[int, int]] = []  # appended by pool threads, consumed by this thread
            check = _ShardCheck(manifest, storage, depth, lambda samples, size: counts.append((samples, size)))
            running = {pool.submit(check, shard) for shard in shards}
            while running:
                done, running = wait(running, _PROGRESS_INTERVAL_S, FIRST_COMPLETED)
                faults += [fault for future in done for fault in future.result()]
                while counts:
                    samples, size = counts.pop()
                    if on_progress is not None:
                        on_progress(samples, size)
    return Verification(
        url=url,
        depth=depth,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.size for shard in manifest.shards),
        faults=tuple(sorted(faults, key=lambda fault: (fault.object, fault.offset or 0))),
    )


def _check_rows(manifest: Manifest) -> Iterator[Fault]:
    """Yield faults of the manifest itself, for example overlapping samples."""
    samples = join(manifest.url, SAMPLES_FILE)
    remedy = (
        f"restore {DATASET_FILE} and {SAMPLES_FILE}, or delete both and write the data set again (m2f shard, or m2f "
        "index for indexed tars)"
    )

    def fault(row: int | None, problem: str) -> Fault:
        key = None if row is None else str(manifest.key[row])
        return Fault(object=samples, key=key, problem=problem, remedy=remedy)

    for values, name in ((manifest.key.astype(str), "key"), (manifest.image_id, "image id")):
        distinct, counts = np.unique(values, return_counts=True)
        for value in distinct[counts > 1][:10]:
            yield fault(int(np.flatnonzero(values == value)[0]), f"its {name} {value} appears more than once")
    inside = (manifest.shard >= 0) & (manifest.shard < len(manifest.shards))
    for row in np.flatnonzero(~inside)[:10]:
        yield fault(int(row), f"it is in shard {manifest.shard[row]}, but there are {len(manifest.shards)} shards")
    if not inside.all():
        return
    sizes = np.array([shard.size for shard in manifest.shards])
    end = manifest.offset + manifest.length
    for row in np.flatnonzero((manifest.offset < 0) | (manifest.length <= 0) | (end > sizes[manifest.shard]))[:10]:
        yield fault(int(row), f"its bytes {manifest.offset[row]} to {end[row]} are not inside its shard")
    order = np.lexsort((manifest.offset, manifest.shard))
    overlaps = (manifest.offset[order][1:] < end[order][:-1]) & (np.diff(manifest.shard[order]) == 0)
    for row in order[1:][overlaps][:10]:
        yield fault(int(row), "its bytes overlap those of the sample before it")
    num_samples = np.bincount(manifest.shard, minlength=len(manifest.shards))
    for shard, count in zip(manifest.shards, num_samples, strict=True):
        if shard.num_samples != count:
            yield fault(
                None, f"{shard.name} has {format_count(count, 'sample')} here and {shard.num_samples} in {DATASET_FILE}"
            )
    unknown = sorted(set(manifest.category_ids.values.tolist()) - set(manifest.categories.by_id))
    if unknown:
        yield fault(None, f"category ids {unknown[:10]} are not in {DATASET_FILE}")
        return
    for name in ("category_counts", "category_areas", "category_pixels"):
        getattr(manifest, name)  # raises DataError if the lengths of lists differ


@dataclass(frozen=True)
class _ShardCheck:
    """Callable that returns the faults of one shard."""

    manifest: Manifest
    storage: Storage
    depth: Depth
    on_progress: OnProgress

    def __call__(self, shard: int) -> list[Fault]:
        url, count = self.manifest.shard_url(shard), self.manifest.shards[shard].num_samples
        try:
            self.manifest.check_shard(shard, self.storage)
            if self.depth == "full":
                return self._read(shard)
        except StorageError as error:
            return [parse_fault(url, str(error))]
        self.on_progress(count, 0)
        return []

    def _read(self, shard: int) -> list[Fault]:
        """Read the shard once, check all samples and the checksum of the shard, and return the faults."""
        manifest, faults = self.manifest, []
        stream = ObjectStream(manifest.shard_url(shard), self.storage)
        rows = np.flatnonzero(manifest.shard == shard)
        for row in rows[np.argsort(manifest.offset[rows])].tolist():
            offset, length = int(manifest.offset[row]), int(manifest.length[row])
            stream.discard(offset)
            problem = _sample_problem(manifest, row, stream.read_at(offset, length))
            if problem is not None:
                key = str(manifest.key[row])
                faults.append(Fault(object=stream.url, key=key, offset=offset, problem=problem, remedy=_REWRITE_REMEDY))
            self.on_progress(1, length)
        if stream.finish() != manifest.shards[shard].sha256 and not faults:
            problem = "its SHA-256 differs from the manifest's in bytes outside all samples"
            faults.append(Fault(object=stream.url, problem=problem, remedy=_REWRITE_REMEDY))
        return faults


def _sample_problem(manifest: Manifest, row: int, data: bytes) -> str | None:
    """Return what is wrong with the bytes of a sample; None if they are correct."""
    try:
        members = manifest.members(row, data)
    except DataError:
        return "its checksum differs from the manifest's"
    for member in range(len(manifest.member_codes[row])):
        if problem := _member_problem(manifest, row, member, data):
            return problem
    try:
        sample = codec.decode(members)
        size = check_annotation(sample.annotation, manifest.categories, "its annotation")
    except DataError as error:
        return f"it cannot be decoded: {error}"
    except Exception as error:  # a malicious sample must not stop the check of the others
        return f"it cannot be decoded: {error!r:.200}"
    actual = {
        "key": sample.key,
        "image_id": sample.image_id,
        "size": size,
        **category_columns(sample.annotation),
    }
    expected = {
        "key": manifest.key[row],
        "image_id": manifest.image_id[row],
        "size": (manifest.height[row], manifest.width[row]),
        "num_segments": manifest.num_segments[row],
        "category_ids": manifest.category_ids[row].tolist(),
        "category_counts": manifest.category_counts[row].tolist(),
        "category_areas": manifest.category_areas[row].tolist(),
    }
    if manifest.category_pixels is not None:
        expected["category_pixels"] = manifest.category_pixels[row].tolist()
    differing = [name for name, value in expected.items() if value != actual[name]]
    return (
        f"its {differing[0]} is {actual[differing[0]]}, but the manifest says {expected[differing[0]]}"
        if differing
        else None
    )


def _member_problem(manifest: Manifest, row: int, member: int, data: bytes) -> str | None:
    """Return what is wrong with the tar header before a member's data; None if it agrees with the manifest.

    If they disagree, other tar tools read other data than m2f.
    """
    offset, length = int(manifest.member_offsets[row][member]), int(manifest.member_lengths[row][member])
    name = manifest.member_names[manifest.member_codes[row][member]]
    header = data[max(0, offset - tarfile.BLOCKSIZE) : offset]
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"member {name} has no tar header ({error})"
    has_long_name = header[99] != 0  # the name field is full: the rest of the name is in an earlier header
    if info.size != length or not (has_long_name or info.name.lower().endswith(name)):
        return f"member {name} of {length} bytes has a tar header for {info.name} of {info.size} bytes"
    return None
