"""Validate COCO's compressed run lengths, for many masks in one call. pycocotools and hotcoco do not validate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2f.data_pipeline.errors import DataError

_MAX_DIGITS = 7
"""Largest number of characters of one number. Each holds 5 bits, so 35 bits together."""
_BATCH_SIZE = 2000
"""Number of texts that are parsed together, which limits memory."""


class DamagedRunsError(ValueError):
    """Raised if a text is not in the format of compressed run lengths."""


def text_areas(texts: Sequence[str], height: int, width: int) -> np.ndarray:
    """Return the area of each mask in pixels, [M] int64.

    The area is -1 if a run is negative or if the runs do not add up to height x width.

    Raises:
        DamagedRunsError: a text is not in the format of compressed run lengths.
    """
    parts = [_areas(texts[start : start + _BATCH_SIZE], height * width) for start in range(0, len(texts), _BATCH_SIZE)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def check_counts(counts: Any, height: int, width: int, name: str) -> None:
    """Check the `counts` of one mask, given as a text or as a list of runs.

    Raises:
        DataError: the counts are invalid. The message begins with `name`.
    """
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):  # refuses 400.5 and true
            raise DataError(f"{name}: its RLE is damaged; runs must be whole numbers")
        is_valid = all(run >= 0 for run in counts) and sum(counts) == height * width
    else:
        try:
            is_valid = text_areas([counts], height, width)[0] >= 0
        except DamagedRunsError:
            raise DataError(f"{name}: its RLE is damaged") from None
    if not is_valid:
        raise DataError(f"{name}: the run lengths of its RLE do not add up to {width} x {height} pixels")


def _areas(texts: Sequence[str], pixels: int) -> np.ndarray:
    """Return the result of `text_areas` for a limited number of texts.

    From the fourth run of a text on, each number is the difference from the run two places before it. Runs are
    therefore cumulative sums over every second number. They are computed for all texts at once, in one array for even
    positions and one for odd. The runs of one text are a stretch of each array, minus the sum before the stretch.
    """
    values, starts = _parse_numbers(texts)
    first = values[starts[:-1]]  # handled separately, because it belongs to neither sequence
    values[starts] = 0
    total, areas, is_valid = first.copy(), np.zeros_like(first), first >= 0
    for parity in (0, 1):
        sums = np.cumsum(values[parity::2])
        bounds = (starts + 1 - parity) // 2
        begin, count = bounds[:-1], np.diff(bounds)
        # A stretch of runs 0, 2, 4, ... begins with the zero that replaced run 0; one of runs 1, 3, ... does not.
        is_background = (starts[:-1] & 1) == parity
        before = np.where(is_background, sums[begin], np.where(begin > 0, sums[begin - 1], 0))
        added = np.where(count > 0, np.add.reduceat(sums, bounds)[:-1] - before * count, 0)
        total += added
        areas += np.where(is_background, 0, added)
        is_valid &= (np.minimum.reduceat(sums, bounds)[:-1] >= before) | (count == 0)
    return np.where(is_valid & (total == pixels), areas, -1)


def _parse_numbers(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Parse M texts that hold R numbers together.

    Return the signed numbers followed by two zeros, [R + 2] int64, and the position of each text's first number
    followed by R, [M + 1].

    Raises:
        DamagedRunsError: a text is not in the format of compressed run lengths.
    """
    try:
        data = "".join(texts).encode("ascii")
    except (TypeError, UnicodeEncodeError):
        raise DamagedRunsError from None
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer(data, np.uint8) - np.uint8(48)  # smaller codes wrap around to values above 63
    ends = np.cumsum(lengths)  # end of each text
    if not lengths.all() or codes.max(initial=0) > 63 or (codes[ends - 1] >= 32).any():
        raise DamagedRunsError
    is_last = codes < 32  # last character of a number; each has 5 bits, the lowest first
    non_last = (~is_last).nonzero()[0]
    starts = np.append(ends - lengths, len(codes))
    starts -= np.searchsorted(non_last, starts)
    values = np.zeros(len(codes) - len(non_last) + 2, dtype=np.int64)
    values[:-2] = (codes[is_last] ^ 16).view(np.int8) - np.int8(16)  # bit 4 of the last character is the sign
    if len(non_last):
        number_index = non_last - np.arange(len(non_last))
        first = np.flatnonzero(np.diff(number_index, prepend=-1))
        counts = np.diff(first, append=len(non_last))
        if counts.max() >= _MAX_DIGITS:
            raise DamagedRunsError
        digit = np.arange(len(non_last)) - np.repeat(first, counts)
        low_bits = np.add.reduceat((codes[non_last] & 31).astype(np.int64) << 5 * digit, first)
        multi_digit = number_index[first]
        values[multi_digit] = (values[multi_digit] << 5 * counts) + low_bits
    return values, starts
