"""Chunks: runs of neighbouring samples of one shard that are fetched by one ranged read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.shards.manifest import Manifest


@dataclass(frozen=True)
class Chunks:
    """N samples grouped into C chunks; whole samples only, and every sample in exactly one chunk."""

    samples: np.ndarray
    """[N] sample indices in storage order: chunk c holds `samples[first[c]:first[c + 1]]`."""
    first: np.ndarray
    """[C + 1] bounds of the chunks in `samples`."""
    chunk_of: np.ndarray
    """[N] chunk of every sample index."""
    shard: np.ndarray
    """[C] shard number."""

    def members(self, chunk: int) -> np.ndarray:
        """Sample indices in this chunk, in storage order."""
        return self.samples[self.first[chunk] : self.first[chunk + 1]]

    def span(self, manifest: Manifest, chunk: int) -> tuple[int, int, int]:
        """Shard, first byte and number of bytes of a whole chunk."""
        first, last = self.members(chunk)[[0, -1]]
        start = int(manifest.offset[first])
        return int(self.shard[chunk]), start, int(manifest.offset[last] + manifest.length[last]) - start


def group_chunks(shard: np.ndarray, offset: np.ndarray, chunk_bytes: int) -> Chunks:
    """Group samples (columns of a manifest, [N] each) by the `chunk_bytes`-sized cell of the shard they start in.

    A chunk spans fewer than `chunk_bytes` bytes besides its last sample.
    """
    samples = np.lexsort((offset, shard))
    cell = offset[samples] // chunk_bytes
    starts = np.ones(len(samples), dtype=bool)
    starts[1:] = (np.diff(shard[samples]) != 0) | (np.diff(cell) != 0)
    first = np.append(np.flatnonzero(starts), len(samples))
    chunk_of = np.empty(len(samples), dtype=np.int64)
    chunk_of[samples] = np.cumsum(starts) - 1
    return Chunks(samples=samples, first=first, chunk_of=chunk_of, shard=shard[samples[first[:-1]]])
