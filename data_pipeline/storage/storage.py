"""One door to bytes: `s3://bucket/key` URLs and local paths behind the same calls.

Local writes are atomic (temporary file, fsync, rename); S3 writes are atomic by nature. Requests that fail for a
passing reason are retried with exponential backoff and full jitter; those that cannot succeed fail at once.
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
from m2f.data_pipeline.storage.s3 import S3Store

LOGGER = logging.getLogger(__name__)


@dataclass
class StorageCounters:
    """What went through one Storage in this process, and what a cache kept from it."""

    requests: int = 0
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cache_hits: int = 0
    bytes_cached: int = 0
    """Bytes that came from the cache."""
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
        """Add to the counters from any thread."""
        with self._lock:
            self.requests += requests
            self.retries += retries
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.cache_hits += cache_hits
            self.bytes_cached += bytes_cached


class _Store(Protocol):
    """What a local and an S3 store have in common."""

    def get(self, url: str) -> bytes: ...
    def get_range(self, url: str, offset: int, length: int, etag: str | None) -> bytes: ...
    def get_file(self, url: str, path: Path) -> int: ...
    def stat(self, url: str) -> ObjectInfo: ...
    def exists(self, url: str) -> bool: ...
    def put(self, url: str, data: bytes, if_absent: bool) -> None: ...
    def put_file(self, url: str, path: Path) -> None: ...
    def list(self, prefix: str) -> tuple[str, ...]: ...
    def delete(self, url: str) -> None: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]: ...
    def delete_unfinished(self, write: UnfinishedWrite) -> None: ...


class Storage:
    """Reads and writes whole objects and byte ranges. Safe in threads; picklable (clients are made per process)."""

    def __init__(
        self,
        config: StorageConfig | None = None,
        answered: bool = False,
        on_wait: Callable[[str], None] = LOGGER.warning,
    ) -> None:
        """With `answered` the store is known to work, so that its silence is an outage; see `StorageConfig.patience_s`.

        `on_wait` gets one line a minute while requests wait; a copy in another process logs it.
        """
        self.config = config or StorageConfig()
        self._make_stores(answered, on_wait)

    def _make_stores(self, answered: bool, on_wait: Callable[[str], None]) -> None:
        self.counters = StorageCounters()
        self._local = LocalStore()
        self._s3 = S3Store(self.config, answered, lambda: self.counters.add(requests=1, retries=1), on_wait)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "answered": self._s3.answered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._make_stores(state["answered"], LOGGER.warning)

    def impatient(self, limit_s: float) -> Storage:
        """The same stores, asked once and for at most `limit_s` seconds: for what is repeated anyway."""
        config = replace(self.config, patience_s=0.0, read_timeout_s=min(limit_s, self.config.read_timeout_s))
        return type(self)(config, answered=True)

    @contextmanager
    def until(self, stopped: threading.Event) -> Iterator[None]:
        """Within it, this thread's requests do not wait for the store any longer once `stopped` is set.

        They raise StorageError then.
        """
        with self._s3.until(stopped):
            yield

    def get(self, url: str) -> bytes:
        """The whole object. Raises StorageError where it cannot be read."""
        data = self._store(url).get(url)
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    def get_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises StorageError where the object is shorter, or where it is not the one that had this `etag`.
        """
        data = self._store(url).get_range(url, offset, length, etag)
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    def get_file(self, url: str, path: str | os.PathLike[str]) -> None:
        """Copy an object of any size to a local file, which appears only when it is complete."""
        written = self._store(url).get_file(url, Path(path))
        self.counters.add(requests=1, bytes_read=written)

    def stat(self, url: str) -> ObjectInfo:
        """Size and version. Raises StorageError where the object does not exist."""
        self.counters.add(requests=1)
        return self._store(url).stat(url)

    def size(self, url: str) -> int:
        """Size in bytes. Raises StorageError where the object does not exist."""
        return self.stat(url).size

    def exists(self, url: str) -> bool:
        """Whether the object exists. Raises StorageError where that cannot be found out."""
        self.counters.add(requests=1)
        return self._store(url).exists(url)

    def put(self, url: str, data: bytes, if_absent: bool = False) -> None:
        """Write an object atomically; with `if_absent`, raise ObjectExistsError rather than replace one."""
        self._store(url).put(url, data, if_absent)
        self.counters.add(requests=1, bytes_written=len(data))

    def put_file(self, url: str, path: str | os.PathLike[str]) -> None:
        """Write a local file of any size as an object, atomically."""
        size = Path(path).stat().st_size
        self._store(url).put_file(url, Path(path))
        self.counters.add(requests=1, bytes_written=size)

    def list(self, prefix: str) -> tuple[str, ...]:
        """Full URLs of all objects under a folder, recursive and sorted; empty where the folder does not exist."""
        self.counters.add(requests=1)
        return self._store(prefix).list(prefix)

    def delete(self, url: str) -> None:
        """Delete an object; nothing happens where it does not exist."""
        self.counters.add(requests=1)
        self._store(url).delete(url)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder and everything in it. Refuses a whole bucket and the root of the file system."""
        self.counters.add(requests=1)
        self._store(prefix).delete_prefix(prefix)

    def list_unfinished(self, prefix: str) -> tuple[UnfinishedWrite, ...]:
        """Writes below a folder that are under way or were never completed: temporary files, multipart uploads."""
        self.counters.add(requests=1)
        return self._store(prefix).list_unfinished(prefix)

    def delete_unfinished(self, write: UnfinishedWrite) -> None:
        """Free what such a write takes up."""
        self.counters.add(requests=1)
        self._store(write.url).delete_unfinished(write)

    def _store(self, url: str) -> _Store:
        scheme, separator, _ = url.partition("://")
        if not separator:
            return self._local
        if scheme == "s3":
            return self._s3
        raise StorageError(f"{url}: scheme {scheme!r} is not supported; use a local path or an s3:// URL")


def join(url: str, *parts: str) -> str:
    """Append parts to a URL or local path with single slashes."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])
