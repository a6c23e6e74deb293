"""Forward pass and loss in one module, which DeepSpeed wraps."""

from __future__ import annotations

import torch
from torch import nn

from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.config import ModelConfig
from m2f.model.loss.criterion import Losses, Normalizers, compute_losses
from m2f.model.loss.points import CounterPoints
from m2f.model.pilots import PilotQueries
from m2f.model.segmenter import Segmenter, TrainingContext
from m2f.trainer.config import Precision
from m2f.trainer.engine.loss_scale import LossScale


class TrainingModule(nn.Module):
    """Normalise the images, predict, match and compute the losses of one micro-batch.

    All of it happens in one forward call, so that ZeRO-3 sees every use of a parameter. Returns tensors only; `total`
    is the only one with gradients.
    """

    def __init__(
        self,
        model: Segmenter,
        config: ModelConfig,
        seed: int,
        precision: Precision,
        *,
        pixel_decoder_fp32: bool = False,
    ) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.model = model
        self.loss = config.loss
        self.num_classes = config.num_classes
        self.seed, self.points = seed, CounterPoints(seed)
        # Outside the model, so that the weights are the same as without pilots.
        self.pilots = PilotQueries(config, seed) if config.pilots.max_targets else None
        self.precision = precision
        model.pixel_decoder_fp32 = pixel_decoder_fp32 or precision == "fp16_autocast"
        self.loss_scale = LossScale(self.parameters()) if precision == "fp16_autocast" else None

    def forward(self, batch: Batch, normalizers: Normalizers) -> Losses:
        """Return the losses of a micro-batch, in fp32 regardless of the forward pass's precision."""
        images = self.model.normalise(batch.images, batch.sizes)
        pilots = None if self.pilots is None else self.pilots(batch.targets)
        # With 16-bit weights, autocast still reconciles them with the parts that stay in fp32.
        dtype = torch.float16 if self.precision in ("fp16", "fp16_autocast") else torch.bfloat16
        with torch.autocast(images.device.type, dtype, enabled=self.precision != "fp32"):
            predictions = self.model(images, TrainingContext(batch.targets, self.seed, pilots))
        losses = compute_losses(
            predictions, batch.targets, self.points, normalizers, self.loss, self.num_classes, pilots
        )
        total = losses.total if self.loss_scale is None else self.loss_scale.scale_gradients(losses.total)
        return Losses(total, losses.terms.detach(), losses.per_image.detach())
