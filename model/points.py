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


class PointSource(Protocol):
    """Where the matcher and the losses take their points from. All points are (x, y) in [0, 1)."""

    def matching(self, position: Tensor, num_layers: int, num_points: int) -> Tensor:
        """Points [L, B, P, 2] for matching; `position` [B] int64 is the place of each image in the data order."""
        ...

    def candidates(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """Points from which importance sampling selects, for every matched row."""
        ...

    def fresh(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """Points used as they are, for every matched row."""
        ...


class _Stream(IntEnum):
    MATCHING = 0
    CANDIDATES = 1
    CANDIDATE_SHIFT = 2
    FRESH = 3
    FRESH_SHIFT = 4


class CounterPoints:
    """Stateless points: a pure function of (seed, position, prediction, target, stream) and the index of the point.

    Restarts, other world sizes and other groupings of the same images therefore see the same points. The number of
    device operations does not depend on the batch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def matching(self, position: Tensor, num_layers: int, num_points: int) -> Tensor:
        """See PointSource."""
        return _uniform(self._keys(position, num_layers, _Stream.MATCHING), num_points)

    def candidates(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """See PointSource."""
        return self._rows(position, num_layers, rows, num_points, _Stream.CANDIDATES, _Stream.CANDIDATE_SHIFT)

    def fresh(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """See PointSource."""
        return self._rows(position, num_layers, rows, num_points, _Stream.FRESH, _Stream.FRESH_SHIFT)

    def _rows(
        self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int, points: _Stream, shifts: _Stream
    ) -> RowPoints:
        base = _uniform(self._keys(position, num_layers, points), num_points).flatten(0, 1)
        shift_keys = self._keys(position, num_layers, shifts)[rows.layer, rows.image]
        shift = _to_unit_square(_mix(shift_keys + (rows.target + 1) * _GOLDEN))
        return RowPoints(base, rows.layer * len(position) + rows.image, shift)

    def _keys(self, position: Tensor, num_layers: int, stream: _Stream) -> Tensor:
        """Keys [L, B] of 64 bits."""
        layers = torch.arange(num_layers, device=position.device)[:, None]
        image_keys = _mix(position + _signed(self.seed * _GOLDEN))
        return _mix(image_keys + (layers * len(_Stream) + int(stream) + 1) * _GOLDEN)


class GivenPoints:
    """Points handed over by the caller, to replay the draws of another implementation."""

    def __init__(self, matching: Tensor, candidates: Tensor, fresh: Tensor) -> None:
        self._matching = matching
        """[L, B, P, 2]"""
        self._candidates = candidates
        """[L, B, N, P, 2] in [0, 1)"""
        self._fresh = fresh
        """[L, B, N, P, 2] in [0, 1)"""

    def matching(self, position: Tensor, num_layers: int, num_points: int) -> Tensor:
        """See PointSource."""
        return self._matching

    def candidates(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """See PointSource."""
        return _unshifted(self._candidates[rows.layer, rows.image, rows.target])

    def fresh(self, position: Tensor, num_layers: int, rows: RowIndex, num_points: int) -> RowPoints:
        """See PointSource."""
        return _unshifted(self._fresh[rows.layer, rows.image, rows.target])


def _unshifted(points: Tensor) -> RowPoints:
    return RowPoints(points, torch.arange(len(points), device=points.device), points.new_zeros(len(points), 2))


# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): a counter times an odd
# constant through a bijective finaliser. Tensors lack unsigned 64-bit arithmetic; wrapped products have the same bits.


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift (the operator on int64 copies the sign)."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)).mul_(_MULTIPLIER_1)
    bits = bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_MULTIPLIER_2)
    return bits.bitwise_xor_(_shift_right(bits, 31))


def _uniform(keys: Tensor, num_points: int) -> Tensor:
    """Uniform points [..., P, 2] of every key."""
    counters = torch.arange(1, num_points + 1, device=keys.device) * _GOLDEN
    return _to_unit_square(_mix(keys[..., None] + counters))


def _to_unit_square(bits: Tensor) -> Tensor:
    """[..., 2] in [0, 1): x from the highest 23 bits, y from the 23 below them."""
    pair = torch.stack((_shift_right(bits, 41), _shift_right(bits, 18).bitwise_and_(2**23 - 1)), dim=-1)
    return pair.to(torch.float32).mul_(2.0**-23)
