"""Mask2Former of `transformers` with random weights, and ours with the same ones."""

from __future__ import annotations

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from benchmarks.scenes import CLASSES
from model.config import ModelConfig
from model.mask2former import Mask2Former, build_model
from model.weights import load_weights

CONFIG = ModelConfig(num_classes=CLASSES)


def twins() -> tuple[Mask2Former, Mask2FormerForUniversalSegmentation]:
    """Ours and theirs: R50 with the frozen BatchNorm of the paper (theirs in evaluation mode), nine decoder layers."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(out_features=stages, layer_type="bottleneck")
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, output_auxiliary_logits=True)
    theirs = Mask2FormerForUniversalSegmentation(config).eval()
    ours = build_model(CONFIG, pretrained_backbone=False)
    load_weights(ours, dict(theirs.state_dict()))
    return ours, theirs
