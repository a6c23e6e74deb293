"""What a rank keeps beside the activations: weights, gradients, optimizer state, buckets."""

from __future__ import annotations

import torch

from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.engine import deepspeed_config

CONTEXT_BYTES = 600_000_000
"""What CUDA and its libraries take of a GPU for each process, roughly."""
FULL = 4  # bytes of a number in fp32
_MOMENTS = 8  # bytes per weight: AdamW's two in fp32
WIDTHS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the weights, where it is not fp32, by precision."""


def state_bytes(weights: int, training: TrainingConfig, world: int, frozen: int = 0) -> int:
    """What one rank keeps of that many weights under the recipe's ZeRO stage (Rajbhandari et al., SC 2020, figure 1).

    Of `frozen` ones besides, nothing but themselves. From stage 1 on, DeepSpeed keeps an fp32 copy of the rank's share
    of the trained weights in every precision.
    """
    zero = training.zero
    width = 2 if training.settled_precision in WIDTHS else FULL
    own = -(-weights // world)
    of_weights = own + -(-frozen // world) if zero.stage == 3 else weights + frozen
    of_gradients = own if zero.stage >= 2 else weights
    optimizer = _MOMENTS * weights if zero.stage == 0 else (FULL + _MOMENTS) * own
    if zero.offload_optimizer:
        optimizer = 0
    overlaps = deepspeed_config(training, world)["zero_optimization"]["overlap_comm"]
    buckets = (1 + overlaps) * min(zero.reduce_bucket_size, weights) if zero.stage else 0
    average = FULL * own if training.ema_decay else 0
    return width * (of_weights + of_gradients + buckets) + optimizer + average


def bytes_of_evaluators(wanted: int, taken: int) -> int:
    """What evaluation actors have still to take of a GPU, where they need `wanted` bytes for models and images.

    `taken` bytes of the GPU are no tensors of this process: actors that are there already, and CUDA's own part of it.
    """
    return max(0, wanted - max(0, taken - CONTEXT_BYTES))


def bytes_beside_module(weights: int, training: TrainingConfig, world: int) -> int:
    """What comes on top of a bare module with so many trainable weights and their gradients, both in fp32."""
    return max(0, state_bytes(weights, training, world) - 2 * FULL * weights)
