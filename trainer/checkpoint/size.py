"""Estimate the size of a rank's checkpoint files before they exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from m2f.trainer.config import TrainingConfig
from m2f.trainer.precision import ADAM_BYTES, FP32_BYTES

_SMALL_FILES = 1_000_000
"""Random states, recipe, identity and file headers."""


def checkpoint_bytes(model: nn.Module, training: TrainingConfig, world_size: int, is_first: bool) -> int:
    """Return the bytes of one rank's files of a run's first checkpoint, accurate to a few per cent.

    Later checkpoints share the file of frozen weights.
    """
    parameters = list(model.parameters())
    total, trained = _count(parameters), _count(p for p in parameters if p.requires_grad)
    stage = training.zero.stage
    weight_bytes = 2 if training.settled_precision in ("bf16", "fp16") else FP32_BYTES
    size = _SMALL_FILES
    if stage:  # optimizer files also contain this rank's part of the fp32 copies
        size += (ADAM_BYTES + FP32_BYTES) * trained // world_size
    elif is_first:
        size += ADAM_BYTES * trained
    if is_first and stage < 3:
        size += weight_bytes * trained
    if is_first:
        size += FP32_BYTES * (total + (trained if training.ema_decay else 0))
    return size


def _count(parameters: Iterable[Any]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # under ZeRO-3 numel() counts this rank's part
