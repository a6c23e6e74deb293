"""Choose crop, queries, points, batch and steps to suit a data set and a machine, each with a reason."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass

from m2f.cluster.own_data.survey import Survey

_GB_PER_CROP = 9.0
"""Approximate GPU memory in 10^9 bytes for training with one 1024 x 1024 image (ResNet-50, bf16_autocast)."""


@dataclass(frozen=True)
class Machine:
    """GPUs of the training machine."""

    num_gpus: int
    gpu_gb: float
    """Memory of the smallest GPU in 10^9 bytes; 0 without a GPU."""


@dataclass(frozen=True)
class Choice:
    """A value of a setting and the reason for it."""

    value: int
    reason: str


@dataclass(frozen=True)
class Choices:
    """Values of settings for the recipe."""

    crop: Choice
    queries: Choice
    points: Choice
    micro_batch: Choice
    global_batch: int
    steps: Choice


def detect_machine() -> Machine:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, or all, as nvidia-smi lists them: importing torch would take seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible in ("", "-1"):
        return Machine(0, 0.0)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    command += [f"--id={visible}"] if visible else []
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        sizes = [float(line) * 1.048576e-3 for line in result.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return Machine(0, 0.0)
    return Machine(len(sizes), min(sizes, default=0.0))


def choose_settings(found: Survey, num_train: int, machine: Machine) -> Choices:
    """Choose values that fit the data and the memory. `num_train` is the number of training images."""
    limit = 256 if not machine.num_gpus else 1024 if machine.gpu_gb >= 20 else 640
    side = max(64, min(limit, math.ceil(found.long_side / 32) * 32))
    device = f"{machine.num_gpus} x {machine.gpu_gb:.0f} GB of GPU memory" if machine.num_gpus else "no GPU"
    queries = min(max(100, math.ceil(found.max_objects_per_image * 1.5 / 50) * 50), 1000)
    points = max(1024, min(12544, side * side // 16 // 64 * 64))
    if found.median_object_share < 0.001:
        points = min(points * 2, side * side, 25088)
    num_fitting = int(machine.gpu_gb * 0.9 / (_GB_PER_CROP * (side / 1024) ** 2)) if machine.num_gpus else 2
    micro = max(1, min(8, num_fitting))
    batch = micro * max(1, machine.num_gpus)
    steps = max(500, min(20000, math.ceil(num_train * 60 / batch)))
    return Choices(
        crop=Choice(side, f"median longer side: {found.long_side} pixels; limit with {device}: {limit}"),
        queries=Choice(queries, f"an image has up to {found.max_objects_per_image} segments"),
        points=Choice(points, f"the median segment covers {found.median_object_share:.2%} of its image"),
        micro_batch=Choice(micro, f"images per forward pass and worker, with {device}"),
        global_batch=batch,
        steps=Choice(steps, f"about {steps * batch / max(1, num_train):.0f} epochs of {num_train} images"),
    )
