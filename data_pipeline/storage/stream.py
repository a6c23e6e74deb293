"""A stored object of any size read once, from front to back, with its checksum."""

from __future__ import annotations

import hashlib

from m2f.data_pipeline.storage.storage import Storage

_BLOCK = 8_000_000  # bytes per read


class ObjectStream:
    """The bytes of an object in a window that only moves on: they are fetched once, and forgotten on request.

    Has `read`, `seek` and `tell`, so that `tarfile` can walk over it.
    """

    def __init__(self, url: str, storage: Storage) -> None:
        """Raises StorageError where the object does not exist."""
        info = storage.stat(url)
        self.url, self.size = url, info.size
        self._storage, self._etag = storage, info.etag
        self._buffer = bytearray()
        self._start = 0  # first byte in the buffer
        self._position = 0
        self._digest = hashlib.sha256()

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from an offset that is not discarded; fewer where the object ends. Raises StorageError."""
        assert offset >= self._start, "these bytes are discarded"
        self._fetch(offset + length)
        first = offset - self._start
        return bytes(memoryview(self._buffer)[first : first + length])

    def discard(self, offset: int) -> None:
        """Free the bytes before this offset, which are not read again."""
        offset = min(offset, self._end)  # what is not read yet still counts for the checksum
        if offset - self._start > _BLOCK // 2:  # moving what remains costs time
            del self._buffer[: offset - self._start]
            self._start = offset

    def skip(self, offset: int) -> None:
        """Read up to the byte before this offset and forget what is before that; it still counts for the checksum."""
        last = min(offset, self.size) - 1
        while self._end <= last:
            self.discard(self._end)
            self._fetch(self._end + 1)
        self.discard(last)

    def finish(self) -> str:
        """Read what is left; the SHA-256 of the whole object as hex digits."""
        while self._end < self.size:
            self._fetch(self._end + 1)
            self.discard(self._end)
        return self._digest.hexdigest()

    def is_zero_from(self, offset: int) -> bool:
        """Read what is left; whether it holds nothing but zeros from an offset that is not discarded."""
        while True:
            if any(self.read_at(offset, self._end - offset)):
                return False
            offset = self._end
            self.discard(offset)
            if offset >= self.size:
                return True
            self._fetch(offset + 1)

    def read(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        data = self.read_at(self._position, min(count, max(0, self.size - self._position)))
        self._position += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Where `read` goes on."""
        self._position = offset
        return offset

    def tell(self) -> int:
        """Where `read` goes on."""
        return self._position

    @property
    def _end(self) -> int:
        return self._start + len(self._buffer)

    def _fetch(self, end: int) -> None:
        """Have everything up to `end`, in blocks."""
        while self._end < min(end, self.size):
            count = min(_BLOCK, self.size - self._end)
            block = self._storage.get_range(self.url, self._end, count, self._etag)
            self._digest.update(block)
            self._buffer += block
