"""Fast reader for COCO instance results whose masks are all compressed run lengths, without a dictionary per entry.

msgspec checks the types while it parses. A rejected entry may still be valid (an image id such as 7.0, or polygons). So
callers read a rejected file as JSON and check every entry.
"""

from __future__ import annotations

from typing import Any

import msgspec


class RunLengths(msgspec.Struct, gc=False, frozen=True):
    """A mask as compressed run lengths."""

    size: tuple[int, int]
    """Height and width in pixels."""
    counts: str


class PlainResult(msgspec.Struct, gc=False, frozen=True):
    """One detection with a mask as compressed run lengths. A box is ignored."""

    image_id: int | str
    category_id: int
    score: float
    segmentation: RunLengths


_DECODER = msgspec.json.Decoder(list[PlainResult])


def read_plain_results(data: bytes) -> list[PlainResult] | None:
    """Parse the results; return None if an entry has another form or the data is not JSON."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def as_entry(result: PlainResult) -> dict[str, Any]:
    """Return the result as a dictionary with the fields of a JSON entry. Fields that were ignored are missing."""
    return msgspec.to_builtins(result)
