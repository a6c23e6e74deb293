"""Tar headers with limits, for `tarfile`. Otherwise, an extended header can claim any size and cause endless work."""

from __future__ import annotations

import re
import tarfile
from typing import Any, Self, cast

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Types of extended headers, which hold further fields of the member that follows."""
_MAX_HEADER_BYTES = 64_000
"""Limit of an extended header, and of all global headers of a tar together. File names and times need a few
hundred bytes."""
_MAX_CHAIN = 8
"""Limit of extended headers before one member, because `tarfile` recurses for each. Ordinary tars have up to three."""
_LONG_NUMBER = re.compile(rb"\d{31}")
"""A run of digits that is too long: `tarfile` searches it again from each digit, which takes quadratic time. Sizes and
times have up to 20 digits."""


class BoundedTarInfo(tarfile.TarInfo):
    """Tar header with limits. Reading an invalid or far too expensive one raises tarfile.ReadError."""

    def _proc_member(self, archive: tarfile.TarFile) -> Self:
        state = cast("Any", archive)
        chain = getattr(state, "m2f_chain", 0)
        if self.size < 0:
            raise tarfile.ReadError("a size is negative")
        if self.type in _EXTENDED:
            if self.size > _MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"an extended header has {self.size} bytes; the limit is {_MAX_HEADER_BYTES}")
            if chain >= _MAX_CHAIN:
                raise tarfile.ReadError(f"more than {_MAX_CHAIN} extended headers follow each other")
            if self.type == tarfile.XGLTYPE:
                state.m2f_global = getattr(state, "m2f_global", 0) + self.size
                if state.m2f_global > _MAX_HEADER_BYTES:
                    raise tarfile.ReadError(f"global headers have more than {_MAX_HEADER_BYTES} bytes")
            start = state.fileobj.tell()
            if _LONG_NUMBER.search(state.fileobj.read(self.size)):
                raise tarfile.ReadError("an extended header contains a number of more than 30 digits")
            state.fileobj.seek(start)
            chain += 1
        else:
            chain = 0
        state.m2f_chain = chain
        return cast("Any", super())._proc_member(archive)

    def _proc_gnusparse_00(self, following: tarfile.TarInfo, *_: object) -> None:
        """Mark a sparse file, but unlike `tarfile` do not read its map. Sparse files are refused anyway."""
        cast("Any", following).sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00

    def _proc_sparse(self, archive: tarfile.TarFile) -> Self:
        """Mark a sparse file in the older format, and skip the blocks in which its map continues."""
        state = cast("Any", self)
        has_more = state._sparse_structs[1]
        del state._sparse_structs
        file = cast("Any", archive).fileobj
        while has_more:
            block = file.read(tarfile.BLOCKSIZE)
            has_more = len(block) == tarfile.BLOCKSIZE and bool(block[504])
        state.sparse = []
        self.offset_data = file.tell()
        cast("Any", archive).offset = self.offset_data + state._block(self.size)
        return self
