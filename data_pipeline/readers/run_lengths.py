"""Compressed run lengths of COCO, read for many masks at once: what pycocotools and hotcoco believe unread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.data_pipeline.errors import DataError

_LONGEST = 7
"""Characters of one number; more are over 35 bits."""


class DamagedRunsError(ValueError):
    """A text that is no compressed run lengths."""


def run_lengths(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths [R] int64 of all texts, one after the other, and where each text's begin [M].

    5 bits per character; from the fourth run of a text on they are differences to the run before last. Raises
    DamagedRunsError where a text is not of this form.
    """
    try:
        data = "".join(texts).encode("ascii")
    except (TypeError, UnicodeEncodeError):
        raise DamagedRunsError from None
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer(data, np.uint8) - np.uint8(48)  # what is below wraps and is above 63
    ends = np.cumsum(lengths)  # of every text
    if not lengths.all() or codes.max(initial=0) > 63 or (codes[ends - 1] >= 32).any():
        raise DamagedRunsError
    last = np.flatnonzero(codes < 32)  # the last character of every number
    values = _numbers(codes, last)
    starts = np.searchsorted(last, ends - lengths)
    return _undo_differences(values, starts), starts


def check_texts(texts: Sequence[str], height: int, width: int) -> bool:
    """Whether every text is run lengths that add up to height x width pixels."""
    try:
        runs, starts = run_lengths(texts)
    except DamagedRunsError:
        return False
    return runs.min(initial=0) >= 0 and bool((np.add.reduceat(runs, starts) == height * width).all())


def check_counts(counts: Any, height: int, width: int, name: str) -> None:
    """Check one mask's `counts`, a text or a list of runs. Raises DataError beginning with the name."""
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):  # 400.5, true
            raise DataError(f"{name}: its RLE is damaged; runs are whole numbers")
        sound = all(run >= 0 for run in counts) and sum(counts) == height * width
    else:
        try:
            run_lengths([counts])
        except DamagedRunsError:
            raise DataError(f"{name}: its RLE is damaged") from None
        sound = check_texts([counts], height, width)
    if not sound:
        raise DataError(f"{name}: the run lengths of its RLE do not add up to {width} x {height} pixels")


def _numbers(codes: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The signed numbers whose last characters are at these places."""
    values = (codes[last] ^ 16).astype(np.int64) - 16  # bit 4 of the last character is the sign
    longer, place = np.flatnonzero(np.diff(last, prepend=-1) > 1), 1
    while len(longer):
        if place == _LONGEST:
            raise DamagedRunsError
        values[longer] = values[longer] * 32 + (codes[last[longer] - place] & 31)
        place += 1
        before = last[longer] - place
        going_on = before > np.where(longer > 0, last[longer - 1], -1)
        longer = longer[going_on]
    return values


def _undo_differences(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Runs from numbers of which all but a text's first three are differences to the run before last."""
    sums = values.copy()
    for parity in (0, 1):
        np.cumsum(values[parity::2], out=sums[parity::2])
    # Of a text that starts at s: runs s+2, s+4, ... add up from s+2, and runs s+1, s+3, ... from s+1.
    counts = np.diff(starts, append=len(values))
    offset = np.arange(len(values)) - np.repeat(starts, counts)
    even_base = sums[starts]
    odd_base = np.where(starts > 0, sums[starts - 1], 0)
    base = np.where(offset & 1, np.repeat(odd_base, counts), np.repeat(even_base, counts))
    runs = sums - base
    runs[starts] = values[starts]
    return runs
