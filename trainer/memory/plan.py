"""Calculate, without a GPU, how much GPU memory a recipe needs and how many images fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m2f.data_pipeline.config import DataConfig
from m2f.data_pipeline.order.order import step_positions
from m2f.model.analysis.flops.executed import build_shapes, count_parameters
from m2f.model.analysis.memory import count_activations
from m2f.model.config import ModelConfig
from m2f.model.format_count import format_count
from m2f.trainer.config import TrainingConfig
from m2f.trainer.memory.probe import largest_shape
from m2f.trainer.memory.states import WEIGHT_DTYPES, state_bytes

_USABLE = 0.9
"""Share of a GPU available for tensors; the rest is for the driver, workspaces and gaps between tensors."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Peak memory of a step on one GPU, in bytes."""

    size: tuple[int, int]
    """Height and width of the largest images, in pixels."""
    micro_batch: int
    """Images per forward pass, from the recipe and the number of ranks."""
    states: int
    """Weights, gradients, optimizer state and the buckets in which gradients are exchanged."""
    fixed: int
    """Further memory of a forward and a backward pass that does not depend on the number of images."""
    per_image: int

    def peak(self, images: int) -> int:
        """Return the peak with `images` images per forward pass, in bytes."""
        return self.states + self.fixed + images * self.per_image

    def largest_micro_batch(self, gpu_bytes: float) -> int:
        """Return the number of images per forward pass that fit into a GPU of that size; 0 if not even one fits."""
        return max(0, int((_USABLE * gpu_bytes - self.states - self.fixed) // self.per_image))


def plan_memory(model: ModelConfig, data: DataConfig, training: TrainingConfig, world: int, targets: int) -> MemoryPlan:
    """Calculate the memory of micro-batches of one and of two images with `targets` segments each. Takes seconds."""
    size = largest_shape(data.augment)
    dtype = WEIGHT_DTYPES.get(training.settled_precision, torch.float32)
    fp32 = training.pixel_decoder_fp32 or training.settled_precision == "fp16_autocast"
    one_image, two_images = (
        count_activations(
            model, images, size, targets, training.settled_precision != "fp32", dtype, pixel_decoder_fp32=fp32
        ).peak
        for images in (1, 2)
    )
    shapes = build_shapes(model)
    frozen = sum(p.numel() for p in shapes.parameters() if not p.requires_grad)
    return MemoryPlan(
        size=size,
        micro_batch=len(step_positions(0, training.global_batch, 0, world, training.micro_batch)[0]),
        states=state_bytes(count_parameters(shapes) - frozen, training, world, frozen),
        fixed=max(0, 2 * one_image - two_images),
        per_image=two_images - one_image,
    )


def format_memory(plan: MemoryPlan, world: int, stage: int, gpu_gb: float) -> str:
    """Describe the plan in two lines of text."""
    height, width = plan.size
    largest = plan.largest_micro_batch(gpu_gb * 1e9)
    fits = f"up to {format_count(largest, 'image')} at once fit" if largest else "not even one image fits"
    return "\n".join(
        [
            f"GPU memory    {plan.peak(plan.micro_batch) / 1e9:,.2f} GB with {format_count(plan.micro_batch, 'image')} "
            f"of {height} x {width} at once: {plan.states / 1e9:,.2f} GB of weights, gradients and optimizer state "
            f"(ZeRO {stage} on {format_count(world, 'rank')}), {plan.fixed / 1e9:,.2f} GB fixed and "
            f"{plan.per_image / 1e9:,.2f} GB per image",
            f"              {fits} into a GPU of {gpu_gb:g} GB (training.micro_batch)",
        ]
    )
