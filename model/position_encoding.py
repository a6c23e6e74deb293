"""Sine embeddings of pixel positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m2f.model.constants import cache_constants

TEMPERATURE, EPSILON = 10_000.0, 1e-6
"""Base of the frequencies, and addend against division by zero, as in DETR and the official code."""


@cache_constants(12)  # three levels for each of four image sizes
def sine_position_embedding(height: int, width: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the sine embedding [height, width, channels] of a map, always in float32.

    The first half of the channels encodes y, the second half x. Positions count from one and are scaled to (0, 2 pi],
    as the published weights expect (DETR's embedding with normalisation). The axes are separable, so only height +
    width rows are computed. `channels` must be divisible by 4.
    """
    half = channels // 2
    y = _axis_embedding(height, half, device)[:, None].expand(height, width, half)
    x = _axis_embedding(width, half, device)[None].expand(height, width, half)
    return torch.cat([y, x], dim=-1)


def _axis_embedding(length: int, channels: int, device: torch.device | str) -> Tensor:
    """Return [length, channels], with sines in even channels and cosines in odd ones."""
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    position = position / (length + EPSILON) * (2 * math.pi)
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    angle = position[:, None] / TEMPERATURE**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
