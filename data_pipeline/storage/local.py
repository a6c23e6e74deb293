"""Storage in local files. Writes are atomic and durable: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from m2f.data_pipeline.errors import MissingObjectError, ObjectExistsError, StorageError
from m2f.data_pipeline.folders import walk_folders
from m2f.data_pipeline.storage.object_info import ObjectInfo, UnfinishedWrite

_TEMPORARY = ".partial-"  # files of running or killed writes; never listed
_REFUSED_WRITES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""Error numbers of `link` on file systems without hard links."""


class LocalStore:
    """Store of files on a local or mounted file system. URLs are plain paths. Methods raise StorageError."""

    def get(self, url: str) -> bytes:
        """Return the content of a file."""
        try:
            return Path(url).read_bytes()
        except OSError as error:
            _fail(url, error)

    def get_range(self, url: str, offset: int, length: int, etag: str | None) -> bytes:
        """Return exactly `length` bytes, starting at byte `offset`. `etag` is ignored, because files have none."""
        try:
            with Path(url).open("rb", buffering=0) as file:
                file.seek(offset)
                data = _read_fully(file, length)
        except OSError as error:
            _fail(url, error)
        if len(data) != length:
            raise StorageError(
                f"{url}: {length} bytes were requested at offset {offset}, but the file ends after {len(data)} of "
                "them; it was truncated or replaced"
            )
        return data

    def get_file(self, url: str, path: Path) -> int:
        """Copy a file to `path` and return its size in bytes."""
        try:
            with Path(url).open("rb") as source, replacing(path) as target:
                shutil.copyfileobj(source, target, length=1 << 20)
                return target.tell()
        except OSError as error:
            _fail(url, error)

    def stat(self, url: str) -> ObjectInfo:
        """Return the size of a file."""
        try:
            return ObjectInfo(Path(url).stat().st_size, None)
        except OSError as error:
            _fail(url, error)

    def exists(self, url: str) -> bool:
        """Return whether a file exists."""
        try:
            return Path(url).is_file()
        except OSError as error:
            _fail(url, error)

    def put(self, url: str, data: bytes, if_absent: bool) -> None:
        """Write a file. With `if_absent`, raise ObjectExistsError if it already exists."""
        try:
            with replacing(Path(url), if_absent) as file:
                file.write(data)
        except FileExistsError:
            raise ObjectExistsError(f"{url} already exists and is not overwritten") from None
        except OSError as error:
            _fail(url, error)

    def put_file(self, url: str, path: Path) -> None:
        """Copy the local file `path` to `url`."""
        try:
            with path.open("rb") as source, replacing(Path(url)) as file:
                shutil.copyfileobj(source, file, length=1 << 20)
        except OSError as error:
            _fail(url, error)

    def copy(self, source: str, url: str) -> None:
        """Create `url` with the content of the file `source`: as a hard link, or as a copy where links are impossible.

        Writes replace files and never change them, so files that share their content stay independent.
        """
        path = Path(url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, path)
            _sync_folder(path.parent)
        except OSError as error:
            if error.errno not in _NO_LINKS | {errno.EXDEV, errno.EEXIST}:
                _fail(source if isinstance(error, FileNotFoundError) else url, error)
            self.put_file(url, Path(source))

    def list(self, prefix: str, follow_links: bool = False) -> tuple[str, ...]:
        """Return the sorted paths of all files in a folder and its subfolders, except temporary files."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                _fail(error.filename, error)

        root = prefix.rstrip("/") or "/"
        walk = os.walk(root, onerror=fail)  # by default, an unreadable folder counts as empty
        folders = walk_folders(root, fail) if follow_links else ((folder, names) for folder, _, names in walk)
        paths = []
        for folder, names in folders:
            paths += [f"{folder}/{name}" for name in names if not name.startswith(_TEMPORARY)]
        return tuple(sorted(paths))

    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Return the temporary files of running or killed writes in a folder and its subfolders."""
        names = sorted(Path(prefix).rglob(f"{_TEMPORARY}*"))
        return tuple(UnfinishedWrite(str(path)) for path in names if path.is_file())

    def delete_unfinished(self, write: UnfinishedWrite) -> None:
        """Delete a temporary file if it exists."""
        self.delete(write.url)

    def delete(self, url: str) -> None:
        """Delete a file if it exists."""
        try:
            Path(url).unlink(missing_ok=True)
        except OSError as error:
            _fail(url, error)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder if it exists. The root of the file system is refused."""
        folder = Path(prefix)
        if folder.resolve() == Path(folder.resolve().anchor):
            raise StorageError(f"{prefix}: refusing to delete the root of the file system")
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            _fail(prefix, error)


@contextmanager
def replacing(path: Path, if_absent: bool = False) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` if the block ends without an error.

    Raises:
        FileExistsError: `path` exists and `if_absent` is set.
        StorageError: the file cannot be created, or the disk refuses the write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    except OSError as error:
        _fail(str(path), error)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes files readable only by their owner
            yield file
            file.flush()
            os.fsync(file.fileno())
        if if_absent:
            rename_new(Path(temporary), path)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _REFUSED_WRITES:
            _fail(str(path), error)  # names `path`, although the block may use other files
        raise
    _sync_folder(path.parent)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file. Unlike `os.rename`, raise FileExistsError if the target exists.

    On file systems without hard links (exFAT, some network mounts), readers see an empty file for a moment.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # only one of several writers succeeds
        os.replace(source, target)
    else:
        os.unlink(source)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_fully(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    while len(data) < length and (more := file.read(length - len(data))):  # raw reads may be short
        data += more
    return data


def _fail(url: str, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise MissingObjectError(f"{url} does not exist; check the path") from error
    remedies = {
        errno.EACCES: "check its owner and mode",
        errno.EISDIR: "it is a folder, not a file; check the path",
        errno.ENOSPC: "free some space or choose another disk",
        errno.EDQUOT: "free some space or choose another disk",
        errno.EROFS: "mount it as writable, or choose another folder",
    }
    remedy = remedies.get(error.errno or 0, "check the path and the disk")
    raise StorageError(f"{url}: {error.strerror or error}; {remedy}") from error
