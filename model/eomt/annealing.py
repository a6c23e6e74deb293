"""Annealing of EoMT's attention masks during training (section 3.3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from m2f.model.eomt.config import EomtDecoderConfig
from m2f.model.random_bits import GOLDEN, mix, signed, to_unit_interval
from m2f.model.segmenter import TrainingContext

_STREAM = 0x456F4D54
"""Separates these random numbers from the loss points of the same image."""


def annealing_steps(config: EomtDecoderConfig, max_steps: int) -> tuple[tuple[int, int], ...]:
    """Return two steps for each block with queries.

    At the first step its mask probability starts to fall from 1; at the second it reaches 0.
    """
    if config.annealing is not None:
        return config.annealing
    sixth = max_steps / 6
    gaps = max(1, config.num_layers - 1)
    starts = [sixth * (1 + 3 * block / gaps) for block in range(config.num_layers)]
    return tuple((_nearest(start), _nearest(start + sixth)) for start in starts)


def _nearest(step: float) -> int:
    """Return the nearest step; a half is rounded up, as in the published schedules (`round` prefers even numbers)."""
    return math.floor(step + 0.5)


def mask_probabilities(config: EomtDecoderConfig, step: int, max_steps: int) -> tuple[float, ...]:
    """Return for each block the probability that a query is masked in it, after `step` updates."""
    return probabilities_at(annealing_steps(config, max_steps), config.annealing_power, step)


def probabilities_at(windows: Sequence[tuple[int, int]], power: float, step: int) -> tuple[float, ...]:
    """Return the mask probability of each block at `step`.

    `windows` are the first and the last step of each block's decay from 1 to 0; `power` is its exponent.
    """
    return tuple(
        1.0 if step < start else 0.0 if step >= end else (1 - (step - start) / (end - start)) ** power
        for start, end in windows
    )


def uniform_draws(context: TrainingContext, blocks: int, queries: int) -> Tensor:
    """Return random numbers [L, B, Q] in [0, 1), derived only from seed, the image's data position, block and query."""
    position = context.targets.position
    images = mix(position + signed((context.seed + _STREAM) * GOLDEN))
    counters = torch.arange(1, blocks * queries + 1, device=position.device).mul_(GOLDEN).view(blocks, 1, queries)
    return to_unit_interval(mix(images[:, None] + counters))
