"""Samples of an untrusted WebDataset tar, which is read once from front to back without extracting it."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

from m2f.data_pipeline.keys import key_problem
from m2f.data_pipeline.shards.faults import Fault
from m2f.data_pipeline.shards.tar_headers import BoundedTarInfo
from m2f.data_pipeline.storage.stream import ObjectStream
from m2f.model.errors import UserError

# First bytes of compressed files, which are refused.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_MAX_SAMPLE_BYTES = 1 << 30
"""Limit of a sample, which must fit into memory. Images and label maps are far smaller, but a header can claim more."""
_REPACK_REMEDY = "repack the tar with the files of each sample next to each other"


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """Adjacent members of a tar with the same base name."""

    key: str
    offset: int
    """Offset of the first header in the tar."""
    data: bytes
    """Bytes of headers, members and padding."""
    members: dict[str, tuple[int, int]]
    """First byte in `data` and length of each member, by extension."""

    def contents(self) -> dict[str, bytes]:
        """Return the content of each member by extension."""
        return {name: self.data[start : start + length] for name, (start, length) in self.members.items()}


def walk_tar(stream: ObjectStream) -> Iterator[TarSample | Fault]:
    """Yield the samples of a tar in order. Members that cannot be indexed are yielded as faults.

    The stream is not read to its end; call `ObjectStream.finish` for the checksum. Raises StorageError if the tar
    cannot be read.
    """
    if (compression := _compression(stream)) is not None:
        yield _fault(stream, 0, f"it is compressed ({compression}), so parts of it cannot be read", "unpack it to .tar")
        return
    try:
        with tarfile.open(fileobj=cast("Any", _File(stream)), mode="r:", tarinfo=BoundedTarInfo) as tar:
            end = yield from _samples(stream, tar)
    except UserError:
        raise
    # tarfile does not wrap Python's errors for invalid numbers and names.
    except (tarfile.TarError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        yield _fault(
            stream, stream.tell(), f"it is not a tar, or is truncated or damaged here ({error})", "copy it again"
        )
        return
    # tarfile treats an unreadable header as the end of the archive.
    if end >= stream.size:
        yield _fault(
            stream, stream.size, "it has no end marker and is probably truncated", "copy it again, or repack it"
        )
    elif not stream.is_zero_from(end):
        yield _fault(stream, end, "a header is damaged, or another tar follows; the rest is not read", _REPACK_REMEDY)


class _File:
    """A stream with the attributes of a file that `tarfile` needs."""

    def __init__(self, stream: ObjectStream) -> None:
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell
        self.mode, self.name = "rb", stream.url


def _compression(stream: ObjectStream) -> str | None:
    start = stream.read_at(0, 8)
    return next((name for signature, name in _COMPRESSED.items() if start.startswith(signature)), None)


def _samples(stream: ObjectStream, tar: tarfile.TarFile) -> Generator[TarSample | Fault, None, int]:
    """Group adjacent members by base name and yield them as samples. Return the offset after the last member read."""
    group: list[tuple[str, tarfile.TarInfo]] = []
    key, finished_keys = "", set[str]()
    while (info := tar.next()) is not None:
        cast("Any", tar).members.clear()  # tarfile would keep all headers in memory
        if info.size < 0 or tar.offset < info.offset_data:  # would make the loop endless
            raise tarfile.ReadError("a size is negative")
        if not group:
            stream.discard(info.offset)
        member_key, extension = _split(info.name)
        problem = None if info.isdir() else _problem(info, stream.size)
        if problem is not None:
            yield _fault(stream, info.offset, f"member {info.name[:100]!r} {problem}", "leave it out of the tar")
            if tar.offset > stream.size:
                return stream.size
        is_usable = problem is None and not info.isdir()
        exceeds_limit = tar.offset - (group[0][1].offset if group else info.offset) > _MAX_SAMPLE_BYTES
        if group and (member_key != key if is_usable else exceeds_limit):
            yield _sample(stream, key, group)
            finished_keys.add(key)
            group = []
        if not is_usable:
            if exceeds_limit:
                stream.skip(tar.offset)
            continue
        if member_key in finished_keys:
            yield _fault(
                stream,
                info.offset,
                "its files are not next to each other, or it occurs twice",
                _REPACK_REMEDY,
                member_key,
            )
            continue
        key = member_key
        group.append((extension, info))
        if tar.offset - group[0][1].offset > _MAX_SAMPLE_BYTES:
            problem = f"its files have more than {_MAX_SAMPLE_BYTES} bytes"
            yield _fault(stream, group[0][1].offset, problem, "leave it out of the tar", key)
            finished_keys.add(key)
            group = []
            stream.skip(tar.offset)
    if group:
        yield _sample(stream, key, group)
    return tar.offset


def _problem(info: tarfile.TarInfo, size: int) -> str | None:
    """Return why a member is unusable; None if it is usable. `size` is that of the tar in bytes."""
    if (problem := key_problem(info.name.removeprefix("./"))) is not None:
        return problem
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    if info.offset_data + info.size > size:
        return "is truncated: its header states more bytes than the tar has left"
    if info.size > _MAX_SAMPLE_BYTES:
        return f"has {info.size} bytes; the limit is {_MAX_SAMPLE_BYTES}"
    return None


def _split(name: str) -> tuple[str, str]:
    """Split a member name into key and extension at the first dot of its base name, like webdataset."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _sample(stream: ObjectStream, key: str, group: list[tuple[str, tarfile.TarInfo]]) -> TarSample | Fault:
    first, last = group[0][1].offset, group[-1][1]
    extensions = [extension for extension, _ in group]
    if len(set(extensions)) != len(extensions) or not key:
        return _fault(
            stream, first, f"members {extensions} cannot be distinguished by their extensions", _REPACK_REMEDY, key
        )
    stream.discard(first)
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return TarSample(
        key=key,
        offset=first,
        data=stream.read_at(first, end - first),
        members={extension: (info.offset_data - first, info.size) for extension, info in group},
    )


def _fault(stream: ObjectStream, offset: int, problem: str, remedy: str, key: str | None = None) -> Fault:
    return Fault(object=stream.url, key=key, offset=offset, problem=problem, remedy=remedy)
