"""Counter-based random numbers on the CPU: pure functions of (seed, stream, counter), the same on every machine.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) has no state to save. The key holds the
seed and the stream. The counter holds the data set and epoch, or the position. Restarts, other world sizes and other
worker counts therefore give the same numbers.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = (1 << 64) - 1
"""Mask of 64 bits, the word size of Philox."""


class Stream(IntEnum):
    """Independent streams of random numbers, one per purpose. The values determine every run: never renumber them."""

    CHUNK_ORDER = 1
    WINDOW_ORDER = 2
    AUGMENT = 3
    COPY_PASTE = 4
    REPEATS = 5
    PASTED = 6
    PASTED_OBJECTS = 7
    DROPOUT = 8


def _philox(seed: int, stream: Stream, major: int, minor: int) -> np.random.Philox:
    # The generator counts up in the two low words, so different (major, minor) pairs are at least 2^128 blocks apart.
    key = np.array([seed & _WORD, int(stream)], dtype=np.uint64)
    counter = np.array([0, 0, major & _WORD, minor & _WORD], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def random_words(seed: int, stream: Stream, major: int, minor: int, count: int) -> np.ndarray:
    """Return `count` uniform uint64 words, [count].

    `major` and `minor` select a part of the stream, for example by data set and epoch. NumPy guarantees a stable bit
    stream, but not a stable result of methods such as `permutation`.
    """
    return _philox(seed, stream, major, minor).random_raw(count)


def sample_rng(seed: int, position: int, stream: Stream) -> np.random.Generator:
    """Return the random generator of one stream for the sample at a position of the order."""
    return np.random.Generator(_philox(seed, stream, 0, position))
