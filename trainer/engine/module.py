"""Forward and loss in one module: what DeepSpeed wraps."""

from __future__ import annotations

import torch
from torch import nn

from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.config import ModelConfig
from m2f.model.loss.criterion import Losses, Normalizers, compute_losses
from m2f.model.loss.points import CounterPoints
from m2f.model.mask2former import Mask2Former
from m2f.trainer.config import Precision


class TrainingModule(nn.Module):
    """Normalise, predict, match and compute the losses of one micro-batch.

    Everything happens inside one forward, so that ZeRO-3 sees every use of a parameter. Returns tensors only; of these
    `total` alone carries gradients.
    """

    def __init__(self, model: Mask2Former, config: ModelConfig, seed: int, precision: Precision) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.model = model
        self.loss = config.loss
        self.num_classes = config.num_classes
        self.points = CounterPoints(seed)
        self.precision = precision

    def forward(self, batch: Batch, normalizers: Normalizers) -> Losses:
        """Losses of a micro-batch, in fp32 whatever the precision of the forward."""
        images = self.model.normalise(batch.images, batch.sizes)
        # Where weights have 16 bits themselves, autocast is what brings them together with what stays in fp32.
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, dtype, enabled=self.precision != "fp32"):
            predictions = self.model(images)
        losses = compute_losses(predictions, batch.targets, self.points, normalizers, self.loss, self.num_classes)
        return Losses(losses.total, losses.terms.detach(), losses.per_image.detach())
