"""Results of COCO's instance files of which every entry has the plain form, read without a dictionary for each.

msgspec checks the types while it parses. What it refuses may still be right (an image id such as 7.0, polygons), so
callers read such files as JSON and judge entry by entry.
"""

from __future__ import annotations

from typing import Any

import msgspec


class RunLengths(msgspec.Struct, gc=False, frozen=True):
    """A mask as compressed run lengths."""

    size: tuple[int, int]
    """Height, width."""
    counts: str


class PlainResult(msgspec.Struct, gc=False, frozen=True):
    """One detection with a mask as compressed run lengths. Its box, if it states one, is left out."""

    image_id: int | str
    category_id: int
    score: float
    segmentation: RunLengths


_DECODER = msgspec.json.Decoder(list[PlainResult])


def read_plain_results(data: bytes) -> list[PlainResult] | None:
    """The results; None where an entry has another form or this is no JSON."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def as_entry(result: PlainResult) -> dict[str, Any]:
    """The result as JSON has it."""
    return msgspec.to_builtins(result)
