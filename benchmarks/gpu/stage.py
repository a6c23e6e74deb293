"""`Stage`, the input of every step of `benchmarks.gpu`, and the models, batches and timers that several steps share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from benchmarks.synthetic_batches import CLASSES, make_batch
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.config import (
    LossConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.loss.criterion import Normalizers, count_normalizers
from m2f.model.mask2former import build_model
from m2f.trainer.config import OptimizerConfig, Precision
from m2f.trainer.engine.compile import compile_regions
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups

T = TypeVar("T")


class Skipped(Exception):
    """Raised if this machine cannot run a step; the message states what is missing."""


@dataclass(frozen=True)
class Stage:
    """Device, output folder and input of a step."""

    device: torch.device
    out: Path
    """Folder for results."""
    recording: Path | None = None
    """File written by `benchmarks.record_batches`; None if none was given."""

    @property
    def dry(self) -> bool:
        """Whether this is a dry run: on a CPU with small sizes, only to check that the step works."""
        return self.device.type == "cpu"

    def pick(self, real: T, tiny: T) -> T:
        """Return `tiny` in a dry run, otherwise `real`."""
        return tiny if self.dry else real

    @property
    def compile_cache(self) -> Path:
        """Folder in which the steps keep compiled code."""
        return self.out / "compiled"

    @property
    def precision(self) -> Precision:
        """Precision of the measured training steps."""
        return self.pick("bf16_autocast", "fp32")

    def need_gpu(self) -> None:
        """Raise Skipped in a dry run."""
        if self.dry:
            raise Skipped("needs a GPU")

    @property
    def config(self) -> ModelConfig:
        """Configuration of the R50 model for COCO panoptic segmentation; in a dry run, that of `small_model`."""
        return self.pick(ModelConfig(num_classes=CLASSES), small_model())


class Workload(NamedTuple):
    """A model on a device, a batch, and its normalizers."""

    module: TrainingModule
    batch: Batch
    normalizers: Normalizers

    def backward(self) -> torch.Tensor:
        """Run the forward and the backward pass; return the total loss []."""
        total = self.module(self.batch, self.normalizers).total
        total.backward()
        return total.detach()


def small_model() -> ModelConfig:
    """Return the configuration of a small model with every part of the R50 model. It runs within seconds on a CPU."""
    return ModelConfig(
        backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": (16, 32, 48, 64)}),
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=64, mask_dim=64, num_layers=2, num_heads=4, feedforward_dim=128
        ),
        transformer_decoder=MaskedTransformerDecoderConfig(
            num_queries=30, num_layers=3, hidden_dim=64, num_heads=4, feedforward_dim=128
        ),
        loss=LossConfig(num_points=1024),
        num_classes=9,
    )


def make_workload(
    config: ModelConfig, images: int, size: int, precision: Precision, device: torch.device, objects: int = 10
) -> Workload:
    """Build a model and a batch of `images` images of `size` x `size` pixels with `objects` objects each.

    Weights and images are the same at every call and on every device.
    """
    assert config.num_classes is not None
    torch.manual_seed(0)
    model = build_model(config, pretrained_backbone=False)
    module = TrainingModule(model, config, seed=0, precision=precision).to(device)
    batch = make_batch(images, size, objects)
    targets = replace(batch.targets, labels=batch.targets.labels % config.num_classes)
    batch = replace(batch, targets=targets).to(device)
    normalizers = count_normalizers(batch.targets, config.transformer_decoder.num_queries, config.loss)
    return Workload(module, batch, normalizers)


def compile_workload(workload: Workload, stage: Stage) -> None:
    """Make the model compile its regions at the first step, as training does on GPUs.

    All steps keep compiled code in one folder below `stage.out`. A dry run does not generate kernels.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(stage.compile_cache)
    compile_regions(workload.module.model, stage.pick("inductor", "eager"))


def training_step(workload: Workload) -> Callable[[], None]:
    """Return a function that runs one training step, with a learning rate so small that all losses are equal."""
    optimizer = torch.optim.AdamW(build_param_groups(workload.module, OptimizerConfig(lr=1e-12)), fused=True)

    def step() -> None:
        workload.backward()
        nn.utils.clip_grad_norm_(workload.module.parameters(), 0.01, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Return the median time of `run` in milliseconds, after two warm-up calls.

    On a GPU, `repeats` runs are timed with CUDA events; on a CPU, two runs with the host's clock.
    """
    run()
    run()
    times: list[float] = []
    if device.type == "cpu":
        for _ in range(2):
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    else:
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return round(statistics.median(times), 3)


def describe_error(error: BaseException) -> str:
    """Return the type of an error and the first 200 characters of its message, for a line of a table."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to the norm of the second."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / (exact.norm() + 1e-30))
