"""Random predictions and targets, and the criterion of transformers as a reference. Not a test module."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers.models.mask2former import modeling_mask2former as hf

from benchmarks.quality.transformers_draws import replay
from m2f.model.config import LossConfig
from m2f.model.structures import Predictions, Targets, ignore_id

CLASSES = 7


def make_predictions(images: int, *, layers=3, queries=9, channels=8, size=(13, 17), seed=0) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    return Predictions(
        torch.randn(layers, images, queries, CLASSES + 1, generator=g).requires_grad_(),
        torch.randn(layers, images, queries, channels, generator=g).requires_grad_(),
        torch.randn(images, channels, *size, generator=g).requires_grad_(),
    )


def make_targets(counts, *, size=(40, 56), layers=1, pad=2, seed=0, dtype=torch.uint8) -> Targets:
    """Return random rectangles as targets. Later ones cover earlier ones of the same layer.

    Target n lies in layer n modulo `layers`. The right and bottom borders are padding.
    """
    g = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts, default=0) + pad
    height, width = size
    id_maps = torch.zeros(images, layers, height, width, dtype=dtype)
    layer = torch.zeros(images, most, dtype=torch.int64)
    local_id = torch.zeros(images, most, dtype=torch.int64)
    labels = torch.zeros(images, most, dtype=torch.int64)
    valid = torch.zeros(images, most, dtype=torch.bool)
    for b, count in enumerate(counts):
        for n in range(count):
            top, left = (int(torch.randint(0, s - 8, (), generator=g)) for s in size)
            tall, wide = (int(torch.randint(6, 25, (), generator=g)) for _ in range(2))
            layer[b, n], local_id[b, n], valid[b, n] = n % layers, n + 1, True
            labels[b, n] = torch.randint(0, CLASSES, (), generator=g)
            id_maps[b, n % layers, top : top + tall, left : left + wide] = n + 1
        id_maps[b, :, height - 3 :] = ignore_id(dtype)
        id_maps[b, :, :, width - 5 :] = ignore_id(dtype)
    return Targets(
        id_maps=id_maps,
        labels=labels,
        layer=layer,
        local_id=local_id,
        valid=valid,
        weight=torch.ones(images),
        dataset=torch.zeros(images, dtype=torch.int64),
        position=torch.arange(images) + 100,
    )


def one_hot(targets: Targets, image: int) -> torch.Tensor:
    """Return the dense masks [T, H, W] of one image."""
    maps = targets.id_maps[image]
    valid = targets.valid[image]
    pairs = zip(targets.layer[image][valid], targets.local_id[image][valid], strict=True)
    masks = [maps[layer] == local_id for layer, local_id in pairs]
    return torch.stack(masks).float() if masks else torch.zeros(0, *maps.shape[-2:])


def transformers_losses(class_logits, masks, targets: Targets, config: LossConfig, monkeypatch):
    """Return the unweighted terms [L, 3] of the transformers criterion, and the points that it drew.

    `class_logits` [L, B, Q, K + 1] and `masks` [L, B, Q, h, w].
    """
    drawn, assigned = [], []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(rand(*a, **k)) or drawn[-1])
    settings = SimpleNamespace(
        num_labels=class_logits.shape[-1] - 1,
        no_object_weight=config.no_object_weight,
        train_num_points=config.num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
    )
    criterion = hf.Mask2FormerLoss(settings, {})
    criterion.matcher.register_forward_hook(lambda module, inputs, output: assigned.append(output))
    layers, images = masks.shape[:2]
    torch.manual_seed(3)
    result = criterion(
        masks[-1],
        class_logits[-1],
        [one_hot(targets, b) for b in range(images)],
        [targets.labels[b][targets.valid[b]] for b in range(images)],
        [{"masks_queries_logits": masks[i], "class_queries_logits": class_logits[i]} for i in range(layers - 1)],
    )
    monkeypatch.setattr(torch, "rand", rand)
    names = ("loss_cross_entropy", "loss_mask", "loss_dice")
    suffixes = [f"_{i}" for i in range(layers - 1)] + [""]
    terms = torch.stack([torch.stack([result[name + suffix] for name in names]) for suffix in suffixes])
    order = [layers - 1, *range(layers - 1)]  # transformers draws for the final prediction first
    assignments = [assigned[order.index(layer)] for layer in range(layers)]
    return terms, replay(drawn, assignments, order, targets)
