"""Random points in the unit square for the matcher and the losses, independent of the batch composition.

A training step draws uniform points for three purposes (paper section 3.3):

- matching: one set per image and prediction;
- candidates: a larger set per matched mask, of which the most uncertain are kept;
- fresh points: a smaller set per matched mask, all of which are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m2f.model.random_bits import GOLDEN, mix, signed


class RowIndex(NamedTuple):
    """Identifies the mask of each of R rows: prediction l, image b of the micro-batch, target n of that image."""

    layer: Tensor
    """[R] int64 index l of the prediction."""
    image: Tensor
    """[R] int64 index b of the image in the micro-batch."""
    target: Tensor
    """[R] int64 index n of the target in its image."""


@dataclass(frozen=True)
class RowPoints:
    """Points of R rows, stored as G shared base sets and one shift modulo 1 per row.

    Independent uniform points shifted modulo 1 stay independent and uniform. Every row therefore has the distribution
    of fresh points, but only G sets are drawn instead of R. Slices of rows are computed on demand to bound memory.
    """

    base: Tensor
    """[G, P, 2] in [0, 1), multiples of 2^-23, so that the shifted sum is exact in fp32."""
    group: Tensor
    """[R] int64 index into the G base sets."""
    shift: Tensor
    """[R, 2] shift of every row, in [0, 1), multiples of 2^-23."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return the points [r, P, 2] as (x, y) of a slice of the rows."""
        return self.base[self.group[rows]].add_(self.shift[rows, None]).frac_()


class PointCounts(NamedTuple):
    """Number of points for each use; 0 if whole masks are used instead."""

    matching: int
    """Points per prediction and image."""
    candidates: int
    """Candidates per matched mask. Importance sampling keeps the most uncertain of them."""
    fresh: int
    """Points per matched mask that are used without selection."""


class DrawnPoints(Protocol):
    """The points of one micro-batch, as (x, y) in [0, 1)."""

    @property
    def matching(self) -> Tensor:
        """[L, B, P, 2] points for matching."""
        ...

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """Return the candidates and the fresh points of matched rows."""
        ...


class PointSource(Protocol):
    """Source of the points for the matcher and the losses."""

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> DrawnPoints:
        """Draw the points of a micro-batch. `position` [B] int64 is the position of each image in the data order."""
        ...


class _Stream(IntEnum):
    MATCHING = 0
    CANDIDATES = 1
    CANDIDATE_SHIFT = 2
    FRESH = 3
    FRESH_SHIFT = 4


class CounterPoints:
    """Stateless points: a pure function of (seed, position, prediction, target, stream) and the index of the point.

    Restarts, other world sizes and other groupings of the same images therefore use the same points. All streams are
    drawn at once, so the number of device operations does not depend on the batch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> CounterDraw:
        """Draw the points of a micro-batch; see PointSource."""
        image_keys = mix(position + signed(self.seed * GOLDEN))
        streams = torch.arange(1, num_layers * len(_Stream) + 1, device=position.device).mul_(GOLDEN)
        keys = mix(image_keys + streams.view(num_layers, len(_Stream), 1))  # [L, S, B]
        counters = torch.arange(1, max(counts) + 1, device=position.device).mul_(GOLDEN)
        point_streams = (_Stream.MATCHING, _Stream.CANDIDATES, _Stream.FRESH)
        bits = [
            (keys[:, stream, :, None] + counters[:count]).flatten()
            for stream, count in zip(point_streams, counts, strict=True)
        ]
        points = _to_unit_square(mix(torch.cat(bits))).split([len(piece) for piece in bits])
        shape = (num_layers, len(position))
        matching, candidates, fresh = (
            piece.view(*shape, count, 2) for piece, count in zip(points, counts, strict=True)
        )
        return CounterDraw(matching, candidates, fresh, keys)


@dataclass(frozen=True)
class CounterDraw:
    """Points of one micro-batch; see DrawnPoints. Rows of one prediction and image share a base set of points."""

    matching: Tensor
    """[L, B, P, 2] points for matching."""
    candidates: Tensor
    """[L, B, P, 2] base sets of candidates."""
    fresh: Tensor
    """[L, B, P, 2] base sets of fresh points."""
    keys: Tensor
    """[L, streams, B] int64 random keys."""

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """Return the candidates and the fresh points of matched rows."""
        keys = self.keys[:, _Stream.CANDIDATE_SHIFT :: 2].transpose(0, 1)[:, rows.layer, rows.image]
        candidate_shift, fresh_shift = _to_unit_square(mix(keys + (rows.target + 1).mul_(GOLDEN))).unbind()
        group = rows.layer * self.matching.shape[1] + rows.image
        return (
            RowPoints(self.candidates.flatten(0, 1), group, candidate_shift),
            RowPoints(self.fresh.flatten(0, 1), group, fresh_shift),
        )


@dataclass(frozen=True)
class GivenPoints:
    """Points given by the caller, to reproduce the draws of another implementation."""

    matching: Tensor
    """[L, B, P, 2] points for matching."""
    candidates: Tensor
    """[L, B, N, P, 2] candidates of every target, in [0, 1)."""
    fresh: Tensor
    """[L, B, N, P, 2] fresh points of every target, in [0, 1)."""

    def draw(self, position: Tensor, num_layers: int, counts: PointCounts) -> GivenPoints:
        """Return the given points; the arguments are ignored."""
        return self

    def of_rows(self, rows: RowIndex) -> tuple[RowPoints, RowPoints]:
        """Return the candidates and the fresh points of matched rows."""
        candidates, fresh = (points[rows.layer, rows.image, rows.target] for points in (self.candidates, self.fresh))
        return _unshifted(candidates), _unshifted(fresh)


def _unshifted(points: Tensor) -> RowPoints:
    return RowPoints(points, torch.arange(len(points), device=points.device), points.new_zeros(len(points), 2))


def _to_unit_square(bits: Tensor) -> Tensor:
    """Return points [..., 2] in [0, 1): x from the highest 23 bits, y from the next 23 bits."""
    pair = torch.stack((bits >> 41, bits >> 18), dim=-1).bitwise_and_(2**23 - 1)
    return pair.to(torch.float32).mul_(2.0**-23)
