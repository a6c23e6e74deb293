"""Benchmark of a training step with a frozen ViT-S/16 against full training: with a ViT-Adapter, and as a PMT.

A backward pass takes about twice as long as a forward pass. If the transformer takes the share b of a forward pass,
freezing it reduces the time of a step to the share 1 - 2 b / 3. The second row of each model measures b: its ratio is
1 / b, the time of the whole forward pass divided by that of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Measurement, clock_of, compare, time_interleaved
from benchmarks.synthetic_batches import CLASSES, OBJECTS, make_batch
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.backbones.vit_adapter import ViTAdapter
from m2f.model.config import (
    ModelConfig,
    PmtDecoderConfig,
    TimmBackboneConfig,
    UpscalePixelDecoderConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.model.pmt.pmt import Pmt
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups

VIT = "vit_small_patch16_dinov3_qkvb"
CONFIGS = {
    "ViT-Adapter": ModelConfig(
        backbone=ViTAdapterBackboneConfig(name=VIT, drop_path=0.0), freeze=("backbone.vit",), num_classes=CLASSES
    ),
    "PMT": ModelConfig(
        backbone=TimmBackboneConfig(name=VIT, features="tokens"),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=PmtDecoderConfig(),
        freeze=("backbone",),
        num_classes=CLASSES,
    ),
}


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure a batch of 1 image at 512 pixels (`tiny`: 256)."""
    size = 256 if tiny else 512
    batch = make_batch(1, size, OBJECTS).to(device)
    shape, repeats = f"1 x {size} x {size}", 2 if tiny else 3
    measurements = []
    for name, config in CONFIGS.items():
        frozen, trained = (_Step(model_config, batch, device) for model_config in (config, replace(config, freeze=())))
        case, peer = f"training step, {name}, ViT-S frozen", "ViT-S trained"
        # Only the first step is compared, because both models then have equal weights.
        step = compare(case, shape, frozen, peer, trained, 1e-4, repeats, device, memory=True)
        share = time_interleaved(frozen.transformer, frozen.forward, repeats, clock_of(device))
        case, peer = f"forward pass, {name}, ViT-S alone", "whole model and loss"
        measurements += [step, Measurement(case, shape, share[0], peer, share[1], 0.0)]
    return measurements


class _Step:
    """A training step of one model, and parts of it."""

    def __init__(self, config: ModelConfig, batch: Batch, device: torch.device) -> None:
        torch.manual_seed(0)
        model = build_model(config, pretrained_backbone=False).to(device).train()
        self.module, self.batch = TrainingModule(model, config, 0, "fp32"), batch
        self.optimizer = torch.optim.AdamW(build_param_groups(self.module, OptimizerConfig()))
        self.normalizers = count_normalizers(batch.targets, config.transformer_decoder.num_queries, config.loss)
        self.images = model.normalise(batch.images)
        self.model = model

    def __call__(self) -> Sequence[Tensor]:
        self.optimizer.zero_grad()
        total = self.module(self.batch, self.normalizers).total
        total.backward()
        self.optimizer.step()
        return (total.detach(),)

    def forward(self) -> None:
        """Run the forward pass and the loss, with gradients enabled."""
        self.module(self.batch, self.normalizers)

    @torch.no_grad()
    def transformer(self) -> None:
        """Run the transformer up to the last layer that the other parts use."""
        match self.model.backbone, self.model:
            case ViTAdapter() as adapter, _:
                adapter.vit.levels(self.images, adapter.layers)
            case vit, Pmt() as pmt:
                vit.levels(self.images, pmt.levels)
