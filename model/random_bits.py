"""Stateless random numbers on any device: a counter times an odd constant through a bijective mixer.

SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). Keys are derived from
keys by the same step, so a number is a function of the seed and of what it is for. Tensors lack unsigned 64-bit
arithmetic; wrapped products have the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)
"""Odd constant that counters are multiplied by: 2^64 over the golden ratio."""
_MULTIPLIER_1 = signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = signed(0x94D049BB133111EB)
"""The constants of the mixer."""


def shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift (the operator on int64 copies the sign)."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)


def mix(bits: Tensor) -> Tensor:
    """64 random bits from each 64 bits of a key plus a counter times GOLDEN."""
    bits = (bits ^ shift_right(bits, 30)).mul_(_MULTIPLIER_1)
    bits = bits.bitwise_xor_(shift_right(bits, 27)).mul_(_MULTIPLIER_2)
    return bits.bitwise_xor_(shift_right(bits, 31))


def to_unit_interval(bits: Tensor) -> Tensor:
    """Float32 in [0, 1) from the highest 24 bits, multiples of 2^-24."""
    return shift_right(bits, 40).to(torch.float32).mul_(2.0**-24)
