"""Chunks: groups of adjacent samples of one shard that one ranged read fetches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m2f.data_pipeline.shards.manifest import Manifest


@dataclass(frozen=True)
class Chunks:
    """N samples grouped into C chunks. A chunk consists of whole samples, and every sample is in exactly one chunk."""

    samples: np.ndarray
    """[N] sample indices in storage order. Chunk c holds `samples[bounds[c]:bounds[c + 1]]`."""
    bounds: np.ndarray
    """[C + 1] bounds of the chunks in `samples`."""
    chunk_of: np.ndarray
    """[N] chunk number of each sample index."""
    shard: np.ndarray
    """[C] shard number of each chunk."""

    def members(self, chunk: int) -> np.ndarray:
        """Return the sample indices of a chunk in storage order."""
        return self.samples[self.bounds[chunk] : self.bounds[chunk + 1]]

    def span(self, manifest: Manifest, chunk: int) -> tuple[int, int, int]:
        """Return the shard number, first byte and number of bytes of a whole chunk."""
        first, last = self.members(chunk)[[0, -1]]
        start = int(manifest.offset[first])
        return int(self.shard[chunk]), start, int(manifest.offset[last] + manifest.length[last]) - start


def group_chunks(shard: np.ndarray, offset: np.ndarray, chunk_bytes: int) -> Chunks:
    """Group the samples of each shard into chunks of about `chunk_bytes` bytes.

    Each shard is divided into cells of `chunk_bytes` bytes. Samples that start in the same cell form a chunk, so a
    chunk without its last sample spans fewer than `chunk_bytes` bytes.

    Args:
        shard: [N] shard number of each sample, a column of the manifest.
        offset: [N] first byte of each sample in its shard, a column of the manifest.
        chunk_bytes: size of a cell.
    """
    samples = np.lexsort((offset, shard))
    cell = offset[samples] // chunk_bytes
    starts = np.ones(len(samples), dtype=bool)
    starts[1:] = (np.diff(shard[samples]) != 0) | (np.diff(cell) != 0)
    bounds = np.append(np.flatnonzero(starts), len(samples))
    chunk_of = np.empty(len(samples), dtype=np.int64)
    chunk_of[samples] = np.cumsum(starts) - 1
    return Chunks(samples=samples, bounds=bounds, chunk_of=chunk_of, shard=shard[samples[bounds[:-1]]])
