"""Benchmark of attention masks, matching, losses and their backward pass, for ten predictions.

The first peer is the published code's order of operations with the same points; losses and all gradients must agree.
The second peer is the criterion of `transformers`, without attention masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Measurement, compare
from benchmarks.peers.official_order import dense_attention_masks, official_loss
from benchmarks.peers.transformers_peer import transformers_criterion
from benchmarks.synthetic_batches import CLASSES, LAYERS, QUERIES, dense_masks, make_batch, random_predictions
from m2f.model.attention import attention_mask, resize_for_attention
from m2f.model.config import LossConfig
from m2f.model.loss.criterion import compute_losses, count_normalizers, point_counts
from m2f.model.loss.points import CounterPoints
from m2f.model.structures import Predictions

HEADS = 8
"""Number of attention heads, as in the paper."""


def run(tiny: bool, device: torch.device) -> list[Measurement]:
    """Return a measurement per number of objects (on a GPU also per number of images), and one of `_criteria`."""
    if device.type == "cpu":
        size, objects = (256, (5, 25)) if tiny else (1024, (5, 11, 25, 60, 100))
        measurements = [_case(1, size, count, device, repeats=3) for count in objects]
        return [*measurements, _criteria(1, size, 11, device, repeats=3)]
    cases = ((2, 11),) if tiny else ((1, 11), (2, 5), (2, 11), (2, 25), (2, 60), (2, 100), (8, 11))
    measurements = [_case(images, 1024, count, device, repeats=20) for images, count in cases]
    return [*measurements, _criteria(2 if tiny else 8, 1024, 11, device, repeats=20)]


def _case(images: int, size: int, objects: int, device: torch.device, repeats: int) -> Measurement:
    predictions = Predictions(*(tensor.requires_grad_() for tensor in random_predictions(images, size, device)[:3]))
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
        return [_allowed_share(allowed), total.detach(), *torch.autograd.grad(total, predictions[:3])]

    def official() -> Sequence[Tensor]:
        masks, blocked_masks = dense_attention_masks(predictions, sizes, HEADS)
        drawn = source.draw(targets.position, LAYERS, point_counts(config))
        total = official_loss(predictions, masks, labels, truth, drawn, config)
        return [1 - _allowed_share(blocked_masks), total.detach(), *torch.autograd.grad(total, predictions[:3])]

    shape_text = f"{images} x {size} x {size}, {objects} masks"
    return compare(
        "heads + matcher + loss", shape_text, ours, "official order", official, 1e-3, repeats, device, memory=True
    )


def _criteria(images: int, size: int, objects: int, device: torch.device, repeats: int) -> Measurement:
    """Compare matching and losses with those of `transformers`.

    The peer also computes the mask logits of all queries, and draws different points.
    """
    predictions = Predictions(*(tensor.requires_grad_() for tensor in random_predictions(images, size, device)[:3]))
    targets, config = make_batch(images, size, objects).targets.to(device), LossConfig()
    truth, labels, source = dense_masks(targets), list(targets.labels), CounterPoints(seed=0)
    normalizers, criterion = count_normalizers(targets, QUERIES, config), transformers_criterion().to(device)

    def ours() -> Sequence[Tensor]:
        total = compute_losses(predictions, targets, source, normalizers, config, CLASSES).total
        torch.autograd.grad(total, predictions[:3])
        return [total.detach()]

    def theirs() -> Sequence[Tensor]:
        masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
        total = criterion(masks, predictions.class_logits, truth, labels)
        torch.autograd.grad(total, predictions[:3])
        return [total.detach()]

    shape_text = f"{images} x {size} x {size}, {objects} masks"
    return compare("matcher + loss", shape_text, ours, "transformers", theirs, 0.03, repeats, device, memory=True)


def _allowed_share(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack([mask.float().mean() for mask in masks])
