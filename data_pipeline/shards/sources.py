"""Which source files a shard was made of, so that `m2f shard` notices when they change.

sources/00000.parquet    one row per file of every sample in the shard: size, time of change and SHA-256

Files are named by their sample and their place among its files, not by paths: copies of a source keep their shards.
Another size is a change; where only the time differs, contents are compared. Shards without such a file are older and
taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.readers import Reader
from m2f.data_pipeline.readers.source_files import FileState, file_state
from m2f.data_pipeline.shards import manifest
from m2f.data_pipeline.storage.bounded_parquet import read_bounded_table
from m2f.data_pipeline.storage.storage import Storage, join

FOLDER = "sources"
_ROWS_AT_ONCE = 4096
_THREADS = 16
"""Hide the latency of network file systems and object stores."""
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "number": pa.int32(),  # among the sample's files
        "size": pa.int64(),  # null, as in the columns below, where the file could not be read
        "mtime_ns": pa.int64(),
        "sha256": pa.binary(32),
    }
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a sample when its shard was written."""

    key: str
    number: int
    """Among the files of the sample."""
    state: FileState | None
    """None where it could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChanges:
    """How source files differ from those that the shards were made of."""

    changed: tuple[str, ...] = ()
    """Paths of files with another content."""
    num_missing: int = 0
    """Files that cannot be read any more; their shards stay."""
    shards: frozenset[int] = frozenset()
    """Shards with changed files."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """SHA-256 of every shard whose files are known."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Files of one shard."""

    shard: int
    digest: str
    """SHA-256 of the shard that was made of them."""
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class _Comparison:
    changed: tuple[str, ...]
    num_missing: int


def write_record(target: str, shard: int, digest: str, files: Sequence[SourceFile], storage: Storage) -> None:
    """Keep the files of a shard with this SHA-256. Nothing is written where samples are not made of files."""
    if not files:
        return
    rows = [
        {"key": file.key, "number": file.number}
        | ({"size": s.size, "mtime_ns": s.mtime_ns, "sha256": s.digest} if (s := file.state) is not None else {})
        for file in files
    ]
    named = _SCHEMA.with_metadata({"shard": json.dumps({"sha256": digest})})
    storage.put(_url(target, shard), manifest.write_table(pa.Table.from_pylist(rows, schema=named)))


def compare_sources(
    reader: Reader,
    target: str,
    num_shards: int,
    storage: Storage,
    on_content: Callable[[], None] | None = None,
) -> SourceChanges:
    """Compare all files of a source with those that the shards in `target` were made of.

    `on_content` is called once, before the first content is compared, which takes as long as reading the files does.
    Where only times have changed they are written down, so that the next comparison is quick.
    """
    present = set(storage.list(join(target, FOLDER)))
    numbers = [shard for shard in range(num_shards) if _url(target, shard) in present]
    if not numbers:
        return SourceChanges()
    position = {key: index for index, key in enumerate(reader.keys)}
    announce = _Once(on_content)

    def compare(shard: int) -> tuple[_Record, _Comparison] | None:
        record = _read_record(target, shard, storage)
        if record is None or not all(file.key in position for file in record.files):  # damaged, or of another plan
            return None
        try:
            return record, _compare(record, reader, position, target, storage, announce)
        except IndexError:  # a sample has fewer files
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [pair for pair in pool.map(compare, numbers) if pair is not None]
    return SourceChanges(
        changed=tuple(path for _, comparison in found for path in comparison.changed),
        num_missing=sum(comparison.num_missing for _, comparison in found),
        shards=frozenset(record.shard for record, comparison in found if comparison.changed),
        digests={record.shard: record.digest for record, _ in found},
    )


class _Once:
    """Calls a function the first time only."""

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
        path, then = reader.files(position[file.key])[file.number], file.state
        now = _size_and_time(path)
        if now is None:
            num_missing += then is not None
        elif then is None:
            changed += [str(path)] if file_state(path) is not None else []
        elif now[0] != then.size:
            changed.append(str(path))
        elif now[1] != then.mtime_ns:
            on_content()
            state = file_state(path)
            if state is None:
                num_missing += 1
            elif state.digest != then.digest:
                changed.append(str(path))
            else:
                times_differ, then = True, state
        files.append(replace(file, state=then))
    if times_differ and not changed:
        with suppress(StorageError):  # a store that can only be read: contents are compared again next time
            write_record(target, record.shard, record.digest, files, storage)
    return _Comparison(tuple(changed), num_missing)


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _read_record(target: str, shard: int, storage: Storage) -> _Record | None:
    """The record of a shard; None where it is damaged, so that nothing is known of its files."""
    try:
        table = read_bounded_table(storage.get(_url(target, shard)))
        digest = parse_json((table.schema.metadata or {})[b"shard"])["sha256"]
        files = _files(table.replace_schema_metadata(None).cast(_SCHEMA))
    except (pa.ArrowException, LookupError, TypeError, ValueError):
        return None
    return _Record(shard, digest, files)


def _files(table: pa.Table) -> tuple[SourceFile, ...]:
    """Raises ValueError where one is there twice, before few bytes become many rows."""
    files: dict[tuple[str, int], SourceFile] = {}
    for batch in table.to_batches(_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            state = None if row["size"] is None else FileState(row["size"], row["mtime_ns"], row["sha256"])
            file = SourceFile(row["key"], row["number"], state)
            if (file.key, file.number) in files:
                raise ValueError(f"file {file.number} of {file.key} is there twice")
            files[file.key, file.number] = file
    return tuple(files.values())


def _url(target: str, shard: int) -> str:
    return join(target, FOLDER, f"{shard:05d}.parquet")
