"""Sequential read of a stored object of any size, with its checksum."""

from __future__ import annotations

import hashlib

from m2f.data_pipeline.storage.storage import Storage

_BLOCK = 8_000_000  # bytes per read


class ObjectStream:
    """Window that moves forward over the bytes of an object. Bytes are fetched once and freed on request.

    `tarfile` can read it through `read`, `seek` and `tell`.
    """

    def __init__(self, url: str, storage: Storage) -> None:
        """Open an object. Raises StorageError if it does not exist."""
        info = storage.stat(url)
        self.url, self.size = url, info.size
        self._storage, self._etag = storage, info.etag
        self._buffer = bytearray()
        self._start = 0  # first byte in the buffer
        self._position = 0
        self._digest = hashlib.sha256()

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from an offset that is not discarded; fewer at the end of the object."""
        assert offset >= self._start, "these bytes are discarded"
        self._fetch(offset + length)
        first = offset - self._start
        return bytes(memoryview(self._buffer)[first : first + length])

    def discard(self, offset: int) -> None:
        """Free the bytes before an offset. They cannot be read again."""
        offset = min(offset, self._end)  # bytes not fetched yet are still needed for the checksum
        if offset - self._start > _BLOCK // 2:  # moving the remaining bytes costs time
            del self._buffer[: offset - self._start]
            self._start = offset

    def skip(self, offset: int) -> None:
        """Fetch all bytes before an offset for the checksum, and discard them except the last one."""
        last = min(offset, self.size) - 1
        while self._end <= last:
            self.discard(self._end)
            self._fetch(self._end + 1)
        self.discard(last)

    def finish(self) -> str:
        """Read the rest of the object and return the SHA-256 of the whole object as hex digits."""
        while self._end < self.size:
            self._fetch(self._end + 1)
            self.discard(self._end)
        return self._digest.hexdigest()

    def is_zero_from(self, offset: int) -> bool:
        """Return whether all bytes from an undiscarded offset are zero. Stops at the first block with another byte."""
        while True:
            if any(self.read_at(offset, self._end - offset)):
                return False
            offset = self._end
            self.discard(offset)
            if offset >= self.size:
                return True
            self._fetch(offset + 1)

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes; fewer at the end of the object."""
        data = self.read_at(self._position, min(count, max(0, self.size - self._position)))
        self._position += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Set the offset of the next `read` and return it."""
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return the offset of the next `read`."""
        return self._position

    @property
    def _end(self) -> int:
        return self._start + len(self._buffer)

    def _fetch(self, end: int) -> None:
        """Fetch all bytes before `end`, in blocks."""
        while self._end < min(end, self.size):
            count = min(_BLOCK, self.size - self._end)
            block = self._storage.get_range(self.url, self._end, count, self._etag)
            self._digest.update(block)
            self._buffer += block
