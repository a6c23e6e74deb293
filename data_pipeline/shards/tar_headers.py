"""Tar headers as `tarfile` reads them, within bounds: an extended header may claim any size and ask for any work."""

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
"""Headers that say more about the member after them."""
_MAX_HEADER_BYTES = 64_000
"""Of an extended header, and of all global ones of a tar. Names and times of files take some hundred bytes."""
_MAX_CHAIN = 8
"""Extended headers before one member; `tarfile` calls itself for each. Usual tars have up to three."""
_LONG_NUMBER = re.compile(rb"\d{31}")
"""Digits that `tarfile` would search through again from each of them; a size or time has up to 20."""


class BoundedTarInfo(tarfile.TarInfo):
    """A header. Reading one raises tarfile.ReadError where it would cost more than bytes of usual headers do."""

    def _proc_member(self, archive: tarfile.TarFile) -> Self:
        state = cast("Any", archive)
        chain = getattr(state, "m2f_chain", 0)
        if self.size < 0:
            raise tarfile.ReadError("a size is negative")
        if self.type in _EXTENDED:
            if self.size > _MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"an extended header has {self.size} bytes; {_MAX_HEADER_BYTES} are allowed")
            if chain >= _MAX_CHAIN:
                raise tarfile.ReadError(f"more than {_MAX_CHAIN} extended headers follow each other")
            if self.type == tarfile.XGLTYPE:
                state.m2f_global = getattr(state, "m2f_global", 0) + self.size
                if state.m2f_global > _MAX_HEADER_BYTES:
                    raise tarfile.ReadError(f"global headers have more than {_MAX_HEADER_BYTES} bytes")
            start = state.fileobj.tell()
            if _LONG_NUMBER.search(state.fileobj.read(self.size)):
                raise tarfile.ReadError("an extended header holds a number of more than 30 digits")
            state.fileobj.seek(start)
            chain += 1
        else:
            chain = 0
        state.m2f_chain = chain
        return cast("Any", super())._proc_member(archive)

    def _proc_gnusparse_00(self, following: tarfile.TarInfo, *_: object) -> None:
        """Mark a sparse file, which is refused whatever its map says; `tarfile` would read that map here."""
        cast("Any", following).sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00

    def _proc_sparse(self, archive: tarfile.TarFile) -> Self:
        """The same for the older form, whose map may go on in blocks of its own."""
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
