"""Random points in the unit square for the matcher and the losses, reproducible at any batch composition.

A training step draws uniform points in three places (paper section 3.3): one set per image and prediction for matching,
a larger candidate set per matched mask of which the most uncertain are kept, and a few fresh ones per matched mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m2f.model.random_bits import GOLDEN, mix, signed


class RowIndex(NamedTuple):
    """Which mask each of R rows is: prediction l, image b of the micro-batch, target n of that image."""

    layer: Tensor
    """[R] int64"""
    image: Tensor
    """[R] int64"""
    target: Tensor
    """[R] int64"""


@dataclass(frozen=True)
class RowPoints:
    """Points of R rows as G shared base sets and one shift on the torus per row.

    A shift of independent uniform points modulo 1 leaves them independent and uniform, so every row follows the law of
    fresh draws while the random numbers cost G sets instead of R. Materialised in slices to bound memory.
    """

    base: Tensor
    """[G, P, 2] in [0, 1), multiples of 2^-23 so that the shifted sum is exact in fp32."""
    group: Tensor
    """[R] int64 into G."""
    shift: Tensor
    """[R, 2] in [0, 1), multiples of 2^-23."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Points [r, P, 2] as (x, y) of a slice of the rows."""
        return self.base[self.group[rows]].add_(self.shift[rows, None]).frac_()


class PointCounts(NamedTuple):
    """How many points are drawn for each use; 0 where whole masks take their place."""

    matching: int
    """Of every prediction and image."""
    candidates: int
    """Of every matched mask: importance sampling keeps the most uncertain of them."""
    fresh: int
    """Of every matched mask, used as they are."""


class DrawnPoints(Protocol):
    """The points of one micro-batch, as (x, y) in [0, 1)."""

    @property
    def matching(self) -> Tensor:
        """[L, B, P, 2]"""
        ...

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """Candidates and fresh points of matched rows."""
        ...


class PointSource(Protocol):
    """Where the matcher and the losses take their points from."""

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> DrawnPoints:
        """Points of a micro-batch; `position` [B] int64 is the place of each image in the data order."""
        ...


class _Stream(IntEnum):
    MATCHING = 0
    CANDIDATES = 1
    CANDIDATE_SHIFT = 2
    FRESH = 3
    FRESH_SHIFT = 4


class CounterPoints:
    """Stateless points: a pure function of (seed, position, prediction, target, stream) and the index of the point.

    Restarts, other world sizes and other groupings of the same images therefore see the same points. All streams are
    drawn at once, and the number of device operations does not depend on the batch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> CounterDraw:
        """See PointSource."""
        image_keys = mix(position + signed(self.seed * GOLDEN))
        streams = torch.arange(1, num_layers * len(_Stream) + 1, device=position.device).mul_(GOLDEN)
        keys = mix(image_keys + streams.view(num_layers, len(_Stream), 1))  # [L, S, B]
        counters = torch.arange(1, max(counts) + 1, device=position.device).mul_(GOLDEN)
        of_points = (_Stream.MATCHING, _Stream.CANDIDATES, _Stream.FRESH)
        bits = [
            (keys[:, stream, :, None] + counters[:count]).flatten()
            for stream, count in zip(of_points, counts, strict=True)
        ]
        points = _to_unit_square(mix(torch.cat(bits))).split([len(piece) for piece in bits])
        shape = (num_layers, len(position))
        matching, candidates, fresh = (
            piece.view(*shape, count, 2) for piece, count in zip(points, counts, strict=True)
        )
        return CounterDraw(matching, candidates, fresh, keys)


@dataclass(frozen=True)
class CounterDraw:
    """See DrawnPoints. Rows of one prediction and image share a base set of points."""

    matching: Tensor
    """[L, B, P, 2]"""
    candidates: Tensor
    """[L, B, P, 2]"""
    fresh: Tensor
    """[L, B, P, 2]"""
    keys: Tensor
    """[L, streams, B] of 64 bits."""

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """See DrawnPoints."""
        keys = self.keys[:, _Stream.CANDIDATE_SHIFT :: 2].transpose(0, 1)[:, rows.layer, rows.image]
        candidate_shift, fresh_shift = _to_unit_square(mix(keys + (rows.target + 1).mul_(GOLDEN))).unbind()
        group = rows.layer * self.matching.shape[1] + rows.image
        return (
            RowPoints(self.candidates.flatten(0, 1), group, candidate_shift),
            RowPoints(self.fresh.flatten(0, 1), group, fresh_shift),
        )


@dataclass(frozen=True)
class GivenPoints:
    """Points handed over by the caller, to replay the draws of another implementation."""

    matching: Tensor
    """[L, B, P, 2]"""
    candidates: Tensor
    """[L, B, N, P, 2] in [0, 1)"""
    fresh: Tensor
    """[L, B, N, P, 2] in [0, 1)"""

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> GivenPoints:
        """See PointSource."""
        return self

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """See DrawnPoints."""
        candidates, fresh = (points[rows.layer, rows.image, rows.target] for points in (self.candidates, self.fresh))
        return _unshifted(candidates), _unshifted(fresh)


def _unshifted(points: Tensor) -> RowPoints:
    return RowPoints(points, torch.arange(len(points), device=points.device), points.new_zeros(len(points), 2))


def _to_unit_square(bits: Tensor) -> Tensor:
    """[..., 2] in [0, 1): x from the highest 23 bits, y from the 23 below them."""
    pair = torch.stack((bits >> 41, bits >> 18), dim=-1).bitwise_and_(2**23 - 1)
    return pair.to(torch.float32).mul_(2.0**-23)
