"""Attention masks, matching, losses and their backward pass, from what ten predictions leave behind.

Against the order of the published code, with the same points: losses and all gradients must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Row, compare
from benchmarks.memory import peak_growth
from benchmarks.official_order import dense_attention_masks, official_loss
from benchmarks.scenes import CLASSES, LAYERS, QUERIES, dense_masks, make_batch, random_predictions
from model.attention import attention_mask, resize_for_attention
from model.config import LossConfig
from model.criterion import compute_losses, count_normalizers, point_counts
from model.points import CounterPoints
from model.structures import Predictions

HEADS = 8


def run(tiny: bool, device: torch.device) -> list[Row]:
    """One row per number of objects (and, on a GPU, of images)."""
    if device.type == "cpu":
        size, objects = (256, (5, 25)) if tiny else (1024, (5, 11, 25))
        return [_case(1, size, count, device, repeats=3) for count in objects]
    cases = ((2, 11),) if tiny else ((1, 11), (2, 5), (2, 11), (2, 25), (2, 60), (8, 11))
    return [_case(images, 1024, count, device, repeats=20) for images, count in cases]


def _case(images: int, size: int, objects: int, device: torch.device, repeats: int) -> Row:
    predictions = Predictions(*(tensor.requires_grad_() for tensor in random_predictions(images, size, device)))
    targets = make_batch(images, size, objects).targets.to(device)
    config, sizes = LossConfig(), [(size // stride, size // stride) for stride in (32, 16, 8)]
    truth, labels, source = dense_masks(targets), list(targets.labels), CounterPoints(seed=0)
    normalizers = count_normalizers(targets, QUERIES, config)

    def ours() -> Sequence[Tensor]:
        resized = [resize_for_attention(predictions.mask_features, level) for level in sizes]
        with torch.no_grad():
            allowed = [
                attention_mask(embeddings, resized[layer % len(sizes)])
                for layer, embeddings in enumerate(predictions.mask_embeddings[:-1])
            ]
        total = compute_losses(predictions, targets, source, normalizers, config, CLASSES).total
        return [_allowed_share(allowed), total.detach(), *torch.autograd.grad(total, predictions)]

    def official() -> Sequence[Tensor]:
        masks, hidden = dense_attention_masks(predictions, sizes, HEADS)
        drawn = source.draw(targets.position, LAYERS, point_counts(config))
        total = official_loss(predictions, masks, labels, truth, drawn, config)
        return [1 - _allowed_share(hidden), total.detach(), *torch.autograd.grad(total, predictions)]

    ours_gb, peer_gb = (peak_growth(side, device) for side in (ours, official))
    shape_text = f"{images} x {size} x {size}, {objects} masks"
    row = compare("heads + matcher + loss", shape_text, ours, "official order", official, 1e-3, repeats, device)
    return replace(row, ours_gb=ours_gb, peer_gb=peer_gb)


def _allowed_share(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack([mask.float().mean() for mask in masks])
