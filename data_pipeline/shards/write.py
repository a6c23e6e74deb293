"""Write shards, in any order and on any machine. The manifest is committed last.

    plan = plan_shards(reader, config, source_fingerprint)
    parts = complete_parts(plan, storage)                       complete parts of an interrupted run
    parts += [write_shard(reader, plan, i, storage) for i in the others]
    commit_manifest(plan, parts, storage)

Every step can be repeated. All machines write byte-identical tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from webdataset import TarWriter

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.readers import Reader, source_fingerprint
from m2f.data_pipeline.readers.source_files import file_state, recorded_reads
from m2f.data_pipeline.sample import Sample
from m2f.data_pipeline.shards import codec, manifest
from m2f.data_pipeline.shards.columns import OPTIONAL_COLUMNS, SAMPLE_SCHEMA
from m2f.data_pipeline.shards.manifest import Manifest, ShardInfo, category_columns
from m2f.data_pipeline.shards.plan import (
    ShardPlan,
    claim_target,
    clear_target,
    committed_document,
    delete_manifest,
    keep_written_plan,
    plan_shards,
)
from m2f.data_pipeline.shards.publish import find_published, has_size, publish
from m2f.data_pipeline.shards.sources import (
    SourceChanges,
    SourceFile,
    compare_sources,
    require_source_files,
    write_record,
)
from m2f.data_pipeline.storage.bounded_parquet import read_bounded_table
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.format_count import format_count


@dataclass(frozen=True, slots=True)
class SampleProblem:
    """A sample, or one of its annotations, that was left out of a shard, with the reason."""

    key: str
    source: str
    """Origin of the image."""
    message: str
    is_in_shard: bool = False
    """Whether the sample is in the shard and only an annotation was left out."""

    @property
    def line(self) -> str:
        """Return source and message as one line. The source is not repeated."""
        return self.message if self.message.startswith(self.source) else f"{self.source}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class ShardPart:
    """Receipt of a shard that was written and verified."""

    index: int
    info: ShardInfo
    samples: pa.Table
    """Rows of SAMPLE_SCHEMA."""
    problems: tuple[SampleProblem, ...] = ()
    repairs: tuple[tuple[str, int], ...] = ()
    """Repairs of samples, each with its count."""
    encoding: int = codec.VERSION
    """`codec.VERSION` of the code that wrote the shard."""


def write_shard(reader: Reader, plan: ShardPlan, shard_index: int, storage: Storage) -> ShardPart:
    """Read, check and write one shard, verify it in the store, and then write its receipt.

    Unusable samples are left out and reported in the returned part.

    Raises:
        DataError: the source lacks a sample of the plan.
        StorageError: writing fails, or the store returns other bytes.
    """
    positions = {key: position for position, key in enumerate(reader.keys)}
    tar = _Tar(shard_index)
    problems: list[SampleProblem] = []
    repairs = Counter[str]()
    files: list[SourceFile] = []
    for key in plan.shard_keys[shard_index]:
        if key not in positions:
            raise DataError(
                f"the source no longer has sample {key!r} of the shard plan; it changed while shards were being written"
            )
        source = reader.source(positions[key])
        with recorded_reads() as reads:
            try:
                sample = reader.read(positions[key])
                tar.add(sample)
            except DataError as error:
                problems.append(SampleProblem(key, source, str(error)))
            except Exception as error:
                error.add_note(f"while writing sample {key!r} ({source})")
                raise
            else:
                problems += [SampleProblem(key, source, message, is_in_shard=True) for message in sample.left_out]
                repairs.update(sample.repairs)
        for number, path in enumerate(reader.files(positions[key])):
            files.append(SourceFile(key, number, reads[path] if path in reads else file_state(path)))
    data, table = tar.close()
    info = ShardInfo(f"shards/{shard_index:05d}.tar", len(data), hashlib.sha256(data).hexdigest(), table.num_rows)
    url = join(plan.target, info.name)
    storage.put(url, data)
    if storage.get(url) != data:
        raise StorageError(
            f"{url}: the store returned different bytes than were written; check the store and run again"
        )
    part = ShardPart(
        index=shard_index,
        info=info,
        samples=table,
        problems=tuple(problems),
        repairs=tuple(sorted(repairs.items())),
    )
    write_record(plan.target, shard_index, info.sha256, files, storage)
    storage.put(_part_url(plan, shard_index), _encode_part(part, plan))
    return part


def complete_parts(plan: ShardPlan, storage: Storage, changes: SourceChanges | None = None) -> tuple[ShardPart, ...]:
    """Claim the target for this plan, and return the parts that need not be written again.

    Such a part has a receipt and a shard of the right size. The part must also be current if the manifest is not
    committed, or if `changes` names shards. A current part has the current encoding, nothing was left out of it, and
    `changes` does not name it.

    Raises:
        DataError: the target belongs to another plan.
    """
    changes = changes or SourceChanges()
    is_kept = committed_document(plan, storage) is not None and not changes.shards
    claim_target(plan, storage)
    present = set(storage.list(plan.target))
    parts = []
    for index in range(len(plan.shard_keys)):
        if _part_url(plan, index) not in present:
            continue
        part = _decode_part(storage.get(_part_url(plan, index)), plan)
        if part is None or not (is_kept or _is_current(part, changes)):
            continue
        if has_size(join(plan.target, part.info.name), part.info.size, storage):
            parts.append(part)
    return tuple(parts)


def prepare_parts(
    reader: Reader, plan: ShardPlan, changes: SourceChanges, storage: Storage, *, skip_bad: bool, redo: bool
) -> dict[int, ShardPart]:
    """Claim the target for this plan, and return by index the parts that need not be written again.

    With `redo`, all shards are deleted. If `changes` names shards, the manifest is deleted.

    Raises:
        DataError: the target belongs to another plan, or shards of a complete data set must be written again and their
            source files cannot be read. With `skip_bad`, only if this applies to all their samples.
        StorageError: the store denies deletion.
    """
    if redo:
        require_source_files(reader, reader.keys, plan.target, skip_bad=skip_bad)
        clear_target(plan.target, storage)
    parts = {part.index: part for part in complete_parts(plan, storage, changes)}
    if committed_document(plan, storage) is not None:
        outdated = {key for index, keys in enumerate(plan.shard_keys) if index not in parts for key in keys}
        require_source_files(reader, outdated, plan.target, skip_bad=skip_bad)
        if changes.shards:
            delete_manifest(plan, storage)
    return parts


def withdraw_outdated(
    plan: ShardPlan, document: dict[str, Any] | None, parts: Iterable[ShardPart], storage: Storage
) -> bool:
    """Delete the manifest if shards that were lost have been written again with other content.

    Args:
        plan: plan of the shards.
        document: `dataset.json` before shards were written; None if there was none.
        parts: parts of all shards.
        storage: storage of the shards.

    Returns:
        Whether the manifest is still there and describes the shards.
    """
    if document is None:
        return False
    shards = [asdict(part.info) for part in sorted(parts, key=lambda part: part.index) if part.info.num_samples]
    if document["shards"] != shards:
        delete_manifest(plan, storage)
        return False
    return True


def commit_manifest(
    plan: ShardPlan, parts: Iterable[ShardPart], storage: Storage, *, skip_bad: bool = False
) -> Manifest:
    """Write samples.parquet and then dataset.json, which completes the data set.

    A second commit changes nothing, but restores samples.parquet if it is missing or damaged.

    Raises:
        DataError: shards are missing, the target holds another data set, no sample is usable, or samples or annotations
            were left out and `skip_bad` is not set.
    """
    by_index = {part.index: part for part in parts}
    missing = sorted(set(range(len(plan.shard_keys))) - by_index.keys())
    if missing:
        raise DataError(
            f"{plan.target}: {len(missing)} of {len(plan.shard_keys)} shards are not written yet: {missing[:10]}"
        )
    ordered = [by_index[i] for i in range(len(plan.shard_keys))]
    non_empty = [part for part in ordered if part.info.num_samples]
    if not non_empty:
        raise DataError(f"{plan.target}: none of the samples of the source can be used")
    samples = manifest.write_table(
        pa.concat_tables([_with_shard_number(part.samples, i) for i, part in enumerate(non_empty)])
    )
    document = manifest.make_document(
        plan=plan.hash,
        source_fingerprint=plan.source_fingerprint,
        categories=plan.categories,
        shards=[part.info for part in non_empty],
        samples=samples,
    )
    if find_published(plan.target, document, storage) is None and not skip_bad:
        _refuse_problems(plan, [problem for part in ordered for problem in part.problems])
    publish(plan.target, document, samples, storage)
    return Manifest.load(plan.target, storage)


def write_dataset(
    reader: Reader,
    config: DatasetConfig,
    storage: Storage,
    *,
    skip_bad: bool = False,
    redo: bool = False,
    progress: Callable[[ShardPart], None] | None = None,
) -> Manifest:
    """Write a complete data set in this process: plan it, write shards and commit the manifest.

    Only shards without a complete part (see `complete_parts`) are written, such as those with changed source files.

    Args:
        reader: reader of the source.
        config: settings of the data set.
        storage: storage of the shards.
        skip_bad: leave out unusable samples and annotations instead of raising DataError.
        redo: delete existing shards and write all of them again.
        progress: called with each part, including those already written.

    Raises:
        DataError: the source cannot be used, or the folder belongs to another plan.
        StorageError: shards cannot be written, or the store denies the deletion of outdated files.
    """
    if config.source is None:
        raise DataError(f"the data set at {config.shards} has no source to shard; set datasets.<name>.source")
    plan = plan_shards(reader, config, source_fingerprint(config.source))
    if not redo:
        plan = keep_written_plan(plan, storage, partial(source_fingerprint, config.source, earlier=True))
    committed = None if redo else committed_document(plan, storage)
    changes = SourceChanges() if redo else compare_sources(reader, plan.target, len(plan.shard_keys), storage)
    parts = prepare_parts(reader, plan, changes, storage, skip_bad=skip_bad, redo=redo)
    for index in range(len(plan.shard_keys)):
        if index not in parts:
            parts[index] = write_shard(reader, plan, index, storage)
        if progress is not None:
            progress(parts[index])
    withdraw_outdated(plan, committed, parts.values(), storage)
    return commit_manifest(plan, parts.values(), storage, skip_bad=skip_bad)


class _Tar:
    """A tar in memory, and the manifest rows of its samples."""

    def __init__(self, shard_index: int) -> None:
        self._shard = shard_index
        self._buffer = io.BytesIO()
        # Fixed owner, mode and time, so that the same samples give the same bytes on every machine.
        self._writer = TarWriter(
            self._buffer, user="m2f", group="m2f", mode=0o444, mtime=0, encoder=False, compress=False
        )
        self._rows: list[dict[str, Any]] = []
        self._end = 0

    def add(self, sample: Sample) -> None:
        """Append one sample. If it cannot be encoded, the tar does not change."""
        members = {name.removeprefix(f"{sample.key}."): data for name, data in codec.encode(sample)}
        assert list(members) == sorted(members), "TarWriter sorts members by name"
        self._writer.write({"__key__": sample.key, **members})
        start, offsets = self._end, []
        for data in members.values():
            offsets.append(self._end + tarfile.BLOCKSIZE - start)
            self._end += tarfile.BLOCKSIZE + -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._rows.append(
            {
                "key": sample.key,
                "shard": self._shard,
                "offset": start,
                "length": self._end - start,
                "image_id": sample.image_id,
                "height": sample.height,
                "width": sample.width,
                "member_names": list(members),
                "member_offsets": offsets,
                "member_lengths": [len(data) for data in members.values()],
                **category_columns(sample.annotation),
            }
        )

    def close(self) -> tuple[bytes, pa.Table]:
        """Return the bytes of the tar and the rows of its samples."""
        self._writer.close()
        data = self._buffer.getvalue()
        view = memoryview(data)
        for row in self._rows:
            row["crc32"] = zlib.crc32(view[row["offset"] : row["offset"] + row["length"]])
        return data, pa.Table.from_pylist(self._rows, schema=SAMPLE_SCHEMA)


def _part_url(plan: ShardPlan, index: int) -> str:
    return join(plan.target, f"parts/{index:05d}.parquet")


def _encode_part(part: ShardPart, plan: ShardPlan) -> bytes:
    receipt = {
        "plan": plan.hash,
        "index": part.index,
        "info": asdict(part.info),
        "problems": [asdict(problem) for problem in part.problems],
        "encoding": part.encoding,
    } | ({"repairs": part.repairs} if part.repairs else {})
    return manifest.write_table(part.samples.replace_schema_metadata({"receipt": json.dumps(receipt)}))


def _decode_part(data: bytes, plan: ShardPlan) -> ShardPart | None:
    """Return the part of a receipt. For a damaged receipt or another plan return None; the shard is written again."""
    try:
        table = read_bounded_table(data)
        receipt = parse_json((table.schema.metadata or {})[b"receipt"])
        return (
            _part_from_receipt(receipt, table.replace_schema_metadata(None)) if receipt["plan"] == plan.hash else None
        )
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError):
        return None


def _part_from_receipt(receipt: dict[str, Any], rows: pa.Table) -> ShardPart:
    for name in set(OPTIONAL_COLUMNS) - set(rows.column_names):
        rows = rows.add_column(
            SAMPLE_SCHEMA.get_field_index(name),
            SAMPLE_SCHEMA.field(name),
            pa.nulls(len(rows), SAMPLE_SCHEMA.field(name).type),
        )
    return ShardPart(
        index=receipt["index"],
        info=ShardInfo(**receipt["info"]),
        samples=rows.cast(SAMPLE_SCHEMA),
        problems=tuple(SampleProblem(**problem) for problem in receipt["problems"]),
        repairs=tuple((repair, count) for repair, count in receipt.get("repairs", ())),
        encoding=receipt.get("encoding", 1),  # old receipts do not have it
    )


def _is_current(part: ShardPart, changes: SourceChanges) -> bool:
    """Return whether writing a shard again would give the same bytes, judged without reading its samples."""
    return (
        not part.problems
        and part.encoding == codec.VERSION
        and not part.samples.column("category_pixels").null_count
        and part.index not in changes.shards
        and changes.digests.get(part.index, part.info.sha256) == part.info.sha256  # else the receipt is outdated
    )


def count_problems(problems: Sequence[SampleProblem], num_samples: int) -> str:
    """Return text such as `2 of 20 samples`, `3 annotations` or `3 annotations and 2 of 20 samples`."""
    inside = sum(problem.is_in_shard for problem in problems)
    annotations, samples = (
        f"{format_count(inside, 'annotation')}",
        f"{len(problems) - inside} of {format_count(num_samples, 'sample')}",
    )
    return " and ".join([annotations] * (inside > 0) + [samples] * (inside < len(problems)))


def _refuse_problems(plan: ShardPlan, problems: Sequence[SampleProblem]) -> None:
    if problems:
        listed = "\n".join(f"  {problem.message}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(
            f"{plan.target}: {count_problems(problems, plan.num_samples)} cannot be used; "
            f"correct them, or set skip_bad to leave them out:\n{listed}{more}"
        )


def _with_shard_number(rows: pa.Table, shard: int) -> pa.Table:
    column = SAMPLE_SCHEMA.get_field_index("shard")
    return rows.set_column(column, SAMPLE_SCHEMA.field(column), pa.array([shard] * rows.num_rows, pa.int32()))
