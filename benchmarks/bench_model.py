"""The whole R50 model, forward and backward of all predictions, against `transformers` with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from benchmarks.measure import Row, compare
from model.config import ModelConfig
from model.mask2former import build_model
from model.weights import load_weights

CLASSES = 133


def run(tiny: bool) -> list[Row]:
    """One row per image size; the backward pass starts from class logits and the last layer's mask logits."""
    torch.manual_seed(0)
    twin = _transformers_r50()
    ours = build_model(ModelConfig(num_classes=CLASSES), pretrained_backbone=False)
    load_weights(ours, dict(twin.state_dict()))
    return [_case(ours, twin, size, repeats=3) for size in ((256,) if tiny else (512, 1024))]


def _case(ours: nn.Module, twin: nn.Module, size: int, repeats: int) -> Row:
    images = torch.randn(1, 3, size, size)

    def run_ours() -> Sequence[Tensor]:
        predictions = ours(images)
        return _backward(ours, predictions.class_logits[-1], predictions.mask_logits())

    def run_twin() -> Sequence[Tensor]:
        output = twin(pixel_values=images)
        return _backward(twin, output.class_queries_logits, output.masks_queries_logits)

    shape = f"1 x {size} x {size}"
    return compare("R50 forward + backward", shape, run_ours, "transformers", run_twin, tolerance=1e-3, repeats=repeats)


def _backward(model: nn.Module, classes: Tensor, masks: Tensor) -> Sequence[Tensor]:
    (classes.square().mean() + masks.square().mean()).backward()
    model.zero_grad()
    return classes.detach(), masks.detach()


def _transformers_r50() -> nn.Module:
    """Random weights; BatchNorm in evaluation mode, as the frozen one of the paper."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(out_features=stages, layer_type="bottleneck")
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, output_auxiliary_logits=True)
    return Mask2FormerForUniversalSegmentation(config).eval()
