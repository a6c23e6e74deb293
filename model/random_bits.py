"""Stateless random numbers on any device: a counter times an odd constant, passed through a bijective mixer.

The algorithm is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). The same
step derives keys from keys, so every number depends only on the seed and its purpose. Tensors have no unsigned 64-bit
arithmetic; wrapped signed products give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(value: int) -> int:
    """Return the int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)
"""Odd constant that multiplies counters: 2^64 divided by the golden ratio."""
_MULTIPLIER_1 = signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = signed(0x94D049BB133111EB)
"""Constants of the mixer."""


def shift_right(bits: Tensor, count: int) -> Tensor:
    """Return the logical right shift; the operator on int64 would copy the sign bit."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)


def mix(bits: Tensor) -> Tensor:
    """Return 64 random bits for each input, which is a key plus a counter times GOLDEN."""
    bits = (bits ^ shift_right(bits, 30)).mul_(_MULTIPLIER_1)
    bits = bits.bitwise_xor_(shift_right(bits, 27)).mul_(_MULTIPLIER_2)
    return bits.bitwise_xor_(shift_right(bits, 31))


def to_unit_interval(bits: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1) from the highest 24 bits; they are multiples of 2^-24."""
    return shift_right(bits, 40).to(torch.float32).mul_(2.0**-24)
