"""Records of the source files of each shard, by which `m2f shard` detects changed files.

sources/00000.parquet    one row per source file of the shard: size, modification time and SHA-256

A file is identified by its sample and its number among the sample's files, not by its path, so a copy of the source
counts as unchanged. A file with another size has changed. If only the time differs, the contents are compared. Old
shards without a record count as unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import DataError, StorageError, format_list
from m2f.data_pipeline.readers import Reader
from m2f.data_pipeline.readers.source_files import FileState, file_state
from m2f.data_pipeline.shards import manifest
from m2f.data_pipeline.storage.bounded_parquet import BATCH_ROWS, read_bounded_table
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.model.format_count import format_count

FOLDER = "sources"
_THREADS = 16
"""Number of threads, to hide the latency of network file systems and object stores."""
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "number": pa.int32(),  # index among the sample's files
        "size": pa.int64(),  # null, like the columns below, if the file could not be read
        "mtime_ns": pa.int64(),
        "sha256": pa.binary(32),
    }
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """State of one source file when its shard was written."""

    key: str
    number: int
    """Index among the files of the sample."""
    state: FileState | None
    """Size, time and SHA-256; None if the file could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChanges:
    """Differences between the current source files and those that the shards were made from."""

    changed: tuple[str, ...] = ()
    """Paths of files with changed content."""
    num_missing: int = 0
    """Number of files that are no longer readable. Their shards are kept."""
    shards: frozenset[int] = frozenset()
    """Shards with changed files."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """SHA-256 of each shard whose source files are recorded."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Record of the source files of one shard."""

    shard: int
    digest: str
    """SHA-256 of the shard that was made from these files."""
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class _Comparison:
    changed: tuple[str, ...]
    num_missing: int


def write_record(target: str, shard: int, digest: str, files: Sequence[SourceFile], storage: Storage) -> None:
    """Write the record of a shard with the SHA-256 `digest`. Without files, nothing is written."""
    if not files:
        return
    rows = [
        {"key": file.key, "number": file.number}
        | ({"size": s.size, "mtime_ns": s.mtime_ns, "sha256": s.digest} if (s := file.state) is not None else {})
        for file in files
    ]
    schema = _SCHEMA.with_metadata({"shard": json.dumps({"sha256": digest})})
    storage.put(_url(target, shard), manifest.write_table(pa.Table.from_pylist(rows, schema=schema)))


def compare_sources(
    reader: Reader,
    target: str,
    num_shards: int,
    storage: Storage,
    on_content: Callable[[], None] | None = None,
) -> SourceChanges:
    """Compare all files of a source with those that the shards in `target` were made from.

    If only the times of a shard's files have changed, the new times are recorded, so the next comparison is fast.

    Args:
        reader: reader of the source.
        target: folder of the shards.
        num_shards: number of shards in the plan.
        storage: storage of the shards.
        on_content: called once before contents are compared, because reading the files takes long.
    """
    present = set(storage.list(join(target, FOLDER)))
    numbers = [shard for shard in range(num_shards) if _url(target, shard) in present]
    if not numbers:
        return SourceChanges()
    position = {key: index for index, key in enumerate(reader.keys)}
    announce = _CallOnce(on_content)

    def compare(shard: int) -> tuple[_Record, _Comparison] | None:
        record = _read_record(target, shard, storage)
        if record is None or not all(file.key in position for file in record.files):  # damaged, or from another plan
            return None
        try:
            return record, _compare(record, reader, position, target, storage, announce)
        except IndexError:  # a sample has fewer files than recorded
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        comparisons = [pair for pair in pool.map(compare, numbers) if pair is not None]
    return SourceChanges(
        changed=tuple(path for _, comparison in comparisons for path in comparison.changed),
        num_missing=sum(comparison.num_missing for _, comparison in comparisons),
        shards=frozenset(record.shard for record, comparison in comparisons if comparison.changed),
        digests={record.shard: record.digest for record, _ in comparisons},
    )


def require_source_files(reader: Reader, keys: Iterable[str], target: str, *, skip_bad: bool) -> None:
    """Check the source files of samples before their existing shards are replaced.

    Args:
        reader: reader of the source.
        keys: keys of the samples. Others are not checked.
        target: folder of the shards.
        skip_bad: accept missing files, unless every sample has one.

    Raises:
        DataError: files do not exist or cannot be read.
    """
    wanted_keys = set(keys)
    samples = [reader.files(i) for i, key in enumerate(reader.keys) if key in wanted_keys]
    files = tuple(dict.fromkeys(path for sample in samples for path in sample))
    with ThreadPoolExecutor(_THREADS) as pool:
        readable = pool.map(lambda path: os.access(path, os.R_OK), files)
        missing = [path for path, is_readable in zip(files, readable, strict=True) if not is_readable]
    unreadable = set(missing)
    if not missing or (skip_bad and any(unreadable.isdisjoint(sample) for sample in samples)):
        return
    remedy = "restore them" if skip_bad else "restore them, or leave out their samples with --skip-bad"
    raise DataError(
        f"{target}: {format_count(len(missing), 'source file')} of the shards to be written again cannot be read "
        f"({format_list(missing, 3)}). The existing files are kept; {remedy}"
    )


class _CallOnce:
    """Callable that calls a function only the first time."""

    def __init__(self, function: Callable[[], None] | None) -> None:
        self._function = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


def _compare(
    record: _Record,
    reader: Reader,
    position: Mapping[str, int],
    target: str,
    storage: Storage,
    on_content: Callable[[], None],
) -> _Comparison:
    changed, num_missing, times_differ, files = [], 0, False, []
    for file in record.files:
        path, recorded = reader.files(position[file.key])[file.number], file.state
        current = _size_and_time(path)
        if current is None:
            num_missing += recorded is not None
        elif recorded is None:
            changed += [str(path)] if file_state(path) is not None else []
        elif current[0] != recorded.size:
            changed.append(str(path))
        elif current[1] != recorded.mtime_ns:
            on_content()
            state = file_state(path)
            if state is None:
                num_missing += 1
            elif state.digest != recorded.digest:
                changed.append(str(path))
            else:
                times_differ, recorded = True, state
        files.append(replace(file, state=recorded))
    if times_differ and not changed:
        with suppress(StorageError):  # on a read-only store, contents are compared again next time
            write_record(target, record.shard, record.digest, files, storage)
    return _Comparison(tuple(changed), num_missing)


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read_record(target: str, shard: int, storage: Storage) -> _Record | None:
    """Return the record of a shard; None if it is damaged."""
    data = storage.get(_url(target, shard))
    try:
        table = read_bounded_table(data)
        digest = parse_json((table.schema.metadata or {})[b"shard"])["sha256"]
        files = _files(table.replace_schema_metadata(None).cast(_SCHEMA))
    except (pa.ArrowException, LookupError, TypeError, ValueError):
        return None
    return _Record(shard, digest, files)


def _files(table: pa.Table) -> tuple[SourceFile, ...]:
    """Return the files in a table.

    Raises:
        ValueError: a file occurs twice. This is detected before a small damaged file expands to many rows.
    """
    files: dict[tuple[str, int], SourceFile] = {}
    for batch in table.to_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            state = None if row["size"] is None else FileState(row["size"], row["mtime_ns"], row["sha256"])
            file = SourceFile(row["key"], row["number"], state)
            if (file.key, file.number) in files:
                raise ValueError(f"file {file.number} of {file.key} occurs twice")
            files[file.key, file.number] = file
    return tuple(files.values())


def _url(target: str, shard: int) -> str:
    return join(target, FOLDER, f"{shard:05d}.parquet")
