"""Benchmark of a training step with a frozen vision transformer against full training: ViT-S/16 with a ViT-Adapter.

A backward pass takes about twice as long as a forward pass. If the transformer takes the share b of a forward pass,
freezing it reduces the time of a step to the share 1 - 2 b / 3. The last row measures b: its ratio is 1 / b, the time
of the whole forward pass divided by that of the transformer.
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
from m2f.model.config import ModelConfig, ViTAdapterBackboneConfig
from m2f.model.loss.criterion import count_normalizers
from m2f.model.mask2former import build_model
from m2f.trainer.config import OptimizerConfig
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.param_groups import build_param_groups

CONFIG = ModelConfig(
    backbone=ViTAdapterBackboneConfig(name="vit_small_patch16_dinov3_qkvb", drop_path=0.0),
    num_classes=CLASSES,
)


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Measure a batch of 1 image at 512 pixels (`tiny`: 256)."""
    size = 256 if tiny else 512
    batch = make_batch(1, size, OBJECTS).to(device)
    frozen, trained = (_Step(replace(CONFIG, freeze=parts), batch, device) for parts in (("backbone.vit",), ()))
    repeats = 2 if tiny else 3
    shape = f"1 x {size} x {size}"
    case, peer = "training step, ViT-S frozen", "ViT-S trained"
    # Only the first step is compared, because both models then have equal weights.
    step = compare(case, shape, frozen, peer, trained, 1e-4, repeats, device, memory=True)
    share = time_interleaved(frozen.transformer, frozen.forward, repeats, clock_of(device))
    return [step, Measurement("forward pass, ViT-S alone", shape, share[0], "whole model and loss", share[1], 0.0)]


class _Step:
    """A training step of one model, and parts of it."""

    def __init__(self, config: ModelConfig, batch: Batch, device: torch.device) -> None:
        torch.manual_seed(0)
        model = build_model(config, pretrained_backbone=False).to(device).train()
        self.module, self.batch = TrainingModule(model, config, 0, "fp32"), batch
        self.optimizer = torch.optim.AdamW(build_param_groups(self.module, OptimizerConfig()))
        self.normalizers = count_normalizers(batch.targets, config.transformer_decoder.num_queries, config.loss)
        self.images = model.normalise(batch.images)
        self.backbone = model.backbone

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
        """Run the transformer up to the last layer that the adapter uses."""
        assert isinstance(self.backbone, ViTAdapter)
        self.backbone.vit.levels(self.images, self.backbone.layers)
