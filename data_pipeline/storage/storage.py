"""Common interface to objects in S3 (`s3://bucket/key`) and local files.

Writes are atomic: S3 guarantees this, and local writes use a temporary file, fsync and rename. After transient errors,
requests to S3 are retried with exponential backoff and full jitter. Requests that cannot succeed fail immediately.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.local import LocalStore
from m2f.data_pipeline.storage.object_info import ObjectInfo, UnfinishedWrite
from m2f.data_pipeline.storage.s3 import S3Store, split_url

LOGGER = logging.getLogger(__name__)


@dataclass
class StorageCounters:
    """Counters of one Storage in this process, and of the cache in front of it."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cache_hits: int = 0
    bytes_cached: int = 0
    """Bytes that were read from the cache."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(
        self,
        *,
        requests: int = 0,
        retries: int = 0,
        bytes_read: int = 0,
        bytes_written: int = 0,
        cache_hits: int = 0,
        bytes_cached: int = 0,
    ) -> None:
        """Add to the counters. Thread-safe."""
        with self._lock:
            self.requests += requests
            self.retries += retries
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.cache_hits += cache_hits
            self.bytes_cached += bytes_cached


class _Store(Protocol):
    """Common interface of the local and the S3 store."""

    def get(self, url: str) -> bytes: ...
    def get_range(self, url: str, offset: int, length: int, etag: str | None) -> bytes: ...
    def get_file(self, url: str, path: Path) -> int: ...
    def stat(self, url: str) -> ObjectInfo: ...
    def exists(self, url: str) -> bool: ...
    def put(self, url: str, data: bytes, if_absent: bool) -> None: ...
    def put_file(self, url: str, path: Path) -> None: ...
    def copy(self, source: str, url: str) -> None: ...
    def list(self, prefix: str, follow_links: bool) -> tuple[str, ...]: ...
    def delete(self, url: str) -> None: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]: ...
    def delete_unfinished(self, write: UnfinishedWrite) -> None: ...


class Storage:
    """Reads and writes objects and byte ranges.

    Thread-safe and picklable; each process makes its own client. Methods raise StorageError.
    """

    def __init__(
        self,
        config: StorageConfig | None = None,
        known_reachable: bool = False,
        on_wait: Callable[[str], None] = LOGGER.warning,
    ) -> None:
        """Set up the stores without connecting to them.

        Args:
            config: settings of the S3 store; None uses the defaults.
            known_reachable: whether the S3 store has answered before. If so, a later failure counts as an outage; see
                `StorageConfig.patience_s`.
            on_wait: called with a line of text about once a minute while requests wait. Copies in other processes log
                the line instead.
        """
        self.config = config or StorageConfig()
        self._make_stores(known_reachable, on_wait)

    def _make_stores(self, known_reachable: bool, on_wait: Callable[[str], None]) -> None:
        self.counters = StorageCounters()
        self._local = LocalStore()
        self._s3 = S3Store(self.config, known_reachable, lambda: self.counters.add(requests=1, retries=1), on_wait)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "known_reachable": self._s3.known_reachable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._make_stores(state["known_reachable"], LOGGER.warning)

    def without_retries(self, limit_s: float) -> Storage:
        """Return a Storage without retries and with a read timeout of at most `limit_s` seconds.

        For callers that retry requests themselves, or must not wait for long.
        """
        config = replace(self.config, patience_s=0.0, read_timeout_s=min(limit_s, self.config.read_timeout_s))
        return type(self)(config, known_reachable=True)

    @contextmanager
    def retry_until(self, stopped: threading.Event) -> Iterator[None]:
        """In this context, once `stopped` is set, this thread's requests raise StorageError instead of retrying."""
        with self._s3.retry_until(stopped):
            yield

    def get(self, url: str) -> bytes:
        """Return the content of an object. Raises StorageError if it cannot be read."""
        data = self._store(url).get(url)
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    def get_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """Return exactly `length` bytes, starting at byte `offset`.

        Raises:
            StorageError: the object is too short, or its ETag is not `etag`.
        """
        data = self._store(url).get_range(url, offset, length, etag)
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    def get_file(self, url: str, path: str | os.PathLike[str]) -> None:
        """Copy an object of any size to a local file. The file appears only when it is complete."""
        size = self._store(url).get_file(url, Path(path))
        self.counters.add(requests=1, bytes_read=size)

    def stat(self, url: str) -> ObjectInfo:
        """Return size and ETag of an object. Raises MissingObjectError if it does not exist."""
        self.counters.add(requests=1)
        return self._store(url).stat(url)

    def size(self, url: str) -> int:
        """Return the size of an object in bytes. Raises MissingObjectError if it does not exist."""
        return self.stat(url).size

    def exists(self, url: str) -> bool:
        """Return whether an object exists. Raises StorageError if this cannot be determined."""
        self.counters.add(requests=1)
        return self._store(url).exists(url)

    def put(self, url: str, data: bytes, if_absent: bool = False) -> None:
        """Write an object atomically. With `if_absent`, raise ObjectExistsError if it already exists."""
        self._store(url).put(url, data, if_absent)
        self.counters.add(requests=1, bytes_written=len(data))

    def put_file(self, url: str, path: str | os.PathLike[str]) -> None:
        """Write a local file of any size as an object, atomically. Large files go to S3 in parts."""
        size = Path(path).stat().st_size
        self._store(url).put_file(url, Path(path))
        self.counters.add(requests=1, bytes_written=size)

    def copy(self, source: str, url: str) -> None:
        """Copy an object within its store, without transferring its bytes where the store permits it.

        Local files are linked: deleting or replacing one of them does not affect the other. Raises MissingObjectError
        if `source` does not exist.
        """
        self.counters.add(requests=1)
        self._store(url).copy(source, url)

    def list(self, prefix: str, follow_links: bool = False) -> tuple[str, ...]:
        """Return the full URLs of all objects below a folder, sorted; empty if the folder does not exist.

        Local folders that are linked in it are searched only with `follow_links`. It is off by default, because callers
        delete files that they find.
        """
        self.counters.add(requests=1)
        return self._store(prefix).list(prefix, follow_links)

    def delete(self, url: str) -> None:
        """Delete an object. A missing object is ignored."""
        self.counters.add(requests=1)
        self._store(url).delete(url)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder and everything in it, if it exists.

        Raises StorageError for a whole bucket or the root of the file system.
        """
        self.counters.add(requests=1)
        self._store(prefix).delete_prefix(prefix)

    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Return running or incomplete writes below a folder: temporary files and multipart uploads."""
        self.counters.add(requests=1)
        return self._store(prefix).list_unfinished(prefix)

    def delete_unfinished(self, write: UnfinishedWrite) -> None:
        """Delete the temporary file or the uploaded parts of an incomplete write."""
        self.counters.add(requests=1)
        self._store(write.url).delete_unfinished(write)

    def _store(self, url: str) -> _Store:
        scheme, separator, _ = url.partition("://")
        if not separator:
            return self._local
        if scheme == "s3":
            return self._s3
        raise StorageError(f"{url}: scheme {scheme!r} is not supported; use a local path or an s3:// URL")


def check_folder(url: str) -> None:
    """Raise StorageError for an empty name, which `join` would turn into the root, and for a URL without a bucket."""
    if not url:
        raise StorageError("the name of the folder is empty; give a local path or an s3:// URL")
    if url.startswith("s3://"):
        split_url(url)


def join(url: str, *parts: str) -> str:
    """Append parts to a URL or local path, separated by single slashes."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])
