"""Mask2Former of `transformers` with random weights, its criterion alone, and our model with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from benchmarks.synthetic_batches import CLASSES
from m2f.model.config import ModelConfig
from m2f.model.mask2former import Mask2Former, build_model
from m2f.model.weights.load import load_weights

CONFIG = ModelConfig(num_classes=CLASSES)


def twins() -> tuple[Mask2Former, Mask2FormerForUniversalSegmentation]:
    """Return our model and theirs with the same random weights.

    Both have an R50, nine decoder layers and the paper's frozen BatchNorm. Theirs is in evaluation mode, which freezes
    BatchNorm.
    """
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(out_features=stages, layer_type="bottleneck")
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, output_auxiliary_logits=True)
    theirs = Mask2FormerForUniversalSegmentation(config).eval()
    ours = build_model(CONFIG, pretrained_backbone=False)
    load_weights(ours, dict(theirs.state_dict()))
    return ours, theirs


class Criterion(nn.Module):
    """Matching and losses of `transformers`, weighted and summed as in its model."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.loss = Mask2FormerLoss(config, weights)
        self.weights = weights

    def forward(self, masks: Tensor, classes: Tensor, truth: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Return the total loss of mask logits [L, B, Q, h, w] and class logits [L, B, Q, K + 1]."""
        auxiliary = [
            {"masks_queries_logits": mask, "class_queries_logits": logits}
            for mask, logits in zip(masks[:-1], classes[:-1], strict=True)
        ]
        losses = self.loss(masks[-1], classes[-1], truth, labels, auxiliary)
        return torch.stack([value * self._weight(name) for name, value in losses.items()]).sum()

    def _weight(self, name: str) -> float:
        return next(weight for key, weight in self.weights.items() if key in name)


def transformers_criterion() -> Criterion:
    """Return the criterion for 100 queries and the classes of synthetic batches."""
    return Criterion(Mask2FormerConfig(num_labels=CLASSES))


def compile_parts(model: Mask2FormerForUniversalSegmentation) -> None:
    """Compile the backbone and the decoders on first use; parts that cannot be compiled stay eager."""
    torch._dynamo.config.suppress_errors = True
    pixels = model.model.pixel_level_module
    for part in (pixels.encoder, pixels.decoder, model.model.transformer_module):
        part.compile(dynamic=False)
