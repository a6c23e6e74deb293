"""Memory of a rank besides activations: weights, gradients, optimizer state and buckets."""

from __future__ import annotations

import torch

from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.engine import deepspeed_config
from m2f.trainer.precision import ADAM_BYTES, FP32_BYTES

CONTEXT_BYTES = 600_000_000
"""Approximate GPU memory that CUDA and its libraries use per process."""
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type of the weights by precision, for precisions in which it is not fp32."""


def state_bytes(weights: int, training: TrainingConfig, world: int, frozen: int = 0) -> int:
    """Return the bytes of training state on one rank, by ZeRO stage (Rajbhandari et al., SC 2020, figure 1).

    `weights` counts the trained weights, `frozen` further ones without gradients and optimizer state. From stage 1 on,
    DeepSpeed keeps an fp32 copy of the rank's part of the trained weights in every precision.
    """
    zero = training.zero
    width = 2 if training.settled_precision in WEIGHT_DTYPES else FP32_BYTES
    own_weights = -(-weights // world)
    stored_weights = own_weights + -(-frozen // world) if zero.stage == 3 else weights + frozen
    stored_gradients = own_weights if zero.stage >= 2 else weights
    optimizer = ADAM_BYTES * weights if zero.stage == 0 else (FP32_BYTES + ADAM_BYTES) * own_weights
    if zero.offload_optimizer:
        optimizer = 0
    overlaps = deepspeed_config(training, world)["zero_optimization"]["overlap_comm"]
    buckets = (1 + overlaps) * min(zero.reduce_bucket_size, weights) if zero.stage else 0
    average = FP32_BYTES * own_weights if training.ema_decay else 0
    return width * (stored_weights + stored_gradients + buckets) + optimizer + average


def remaining_evaluator_bytes(required: int, used: int) -> int:
    """Return the bytes that evaluation actors will still allocate, if they need `required` bytes for models and images.

    `used` counts the bytes of the GPU that this process does not use for tensors: running actors, and CUDA's own
    memory.
    """
    return max(0, required - max(0, used - CONTEXT_BYTES))


def bytes_outside_module(weights: int, training: TrainingConfig, world: int) -> int:
    """Return the bytes needed besides a module with `weights` trainable weights and their gradients, both in fp32."""
    return max(0, state_bytes(weights, training, world) - 2 * FP32_BYTES * weights)
