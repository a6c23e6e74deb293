"""Measure possible rewrites of the model: each one alone, against the current step in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.kernels import only_config
from benchmarks.gpu.stage import Stage, describe_error, make_workload, milliseconds, training_step
from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.deform_attn.tuning import LaunchConfig

FORWARD_CONFIGS = (LaunchConfig(8, 1), LaunchConfig(16, 4), LaunchConfig(32, 4))
BACKWARD_CONFIGS = (LaunchConfig(4, 1), LaunchConfig(8, 2), LaunchConfig(16, 4), LaunchConfig(32, 8))
REPEATS = 10
"""Number of timed steps of each case, whose median is reported."""


def rewrites(stage: Stage) -> dict[str, object]:
    """Return the milliseconds of a step with 2 and 8 images, unchanged and with each change.

    The step with 2 images is also measured compiled.
    """
    stage.need_gpu()
    from m2f.trainer.engine.compile import compile_regions

    facts: dict[str, object] = {}
    for images in (2, 8):
        workload = make_workload(stage.config, images, 1024, "bf16_autocast", stage.device)
        step = training_step(workload)
        facts[f"{images} images as it is"] = milliseconds(step, stage.device, REPEATS)
        for name, change in _changes().items():
            facts[f"{images} images {name}"] = _try_change(change, step, stage)
            print(images, name, facts[f"{images} images {name}"], flush=True)
        if images == 2:
            compile_regions(workload.module.model)
            facts["2 images compiled"] = milliseconds(step, stage.device, REPEATS)
        del workload, step
        torch.cuda.empty_cache()
    return facts


def _try_change(
    change: Callable[[], AbstractContextManager[object]], step: Callable[[], object], stage: Stage
) -> object:
    try:
        with change():
            return milliseconds(step, stage.device, REPEATS)
    except Exception as error:
        return describe_error(error)


def _changes() -> dict[str, Callable[[], AbstractContextManager[object]]]:
    from m2f.model.deform_attn.triton_op import BACKWARD, FORWARD

    without_cudnn = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return {
        "attention without cuDNN": lambda: sdpa_kernel(without_cudnn),
        "TF32 products": _tf32,
        "constants of frozen norms kept": lambda: patch.object(FrozenBatchNorm2d, "forward", cached_constants),
        "GroupNorm in channels_last": lambda: patch.object(
            nn.GroupNorm, "forward", torch.compile(group_norm_channels_last, dynamic=False)
        ),
        **{
            f"msda forward {tuple(config)}": lambda config=config: only_config(FORWARD, config)
            for config in FORWARD_CONFIGS
        },
        **{
            f"msda backward {tuple(config)}": lambda config=config: only_config(BACKWARD, config)
            for config in BACKWARD_CONFIGS
        },
    }


@contextmanager
def _tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def cached_constants(self: FrozenBatchNorm2d, features: Tensor) -> Tensor:
    """Replacement of `FrozenBatchNorm2d.forward` that computes scale and shift once."""
    constants = self.__dict__.get("_kept_constants")
    if constants is None or constants[0].dtype != features.dtype:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        constants = tuple(row.to(features.dtype).view(1, -1, 1, 1) for row in (scale, shift))
        self.__dict__["_kept_constants"] = constants
    return torch.addcmul(constants[1], features, constants[0])


def group_norm_channels_last(self: nn.GroupNorm, features: Tensor) -> Tensor:
    """Replacement of `nn.GroupNorm.forward` for features [B, C, H, W] in channels_last, for the compiler to fuse."""
    batch, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1)
    groups = rows.reshape(batch, height * width, self.num_groups, channels // self.num_groups).float()
    variance, mean = torch.var_mean(groups, (1, 3), keepdim=True, correction=0)
    normed = ((groups - mean) * (variance + self.eps).rsqrt()).view(batch, height, width, channels)
    return (normed * self.weight + self.bias).to(features.dtype).permute(0, 3, 1, 2)
