"""Matching and losses on whole masks, and the focal loss, against transformers' MaskFormer and a dense reference."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from transformers.models.maskformer import modeling_maskformer as hf

from m2f.model.config import LossConfig
from m2f.model.loss.criterion import Normalizers, compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints, PointCounts, RowIndex
from m2f.model.structures import Predictions, Targets, ignore_id

CLASSES, QUERIES, LAYERS = 5, 7, 2
MASKFORMER = LossConfig(
    mask_loss="focal", matching="masks", supervision="masks", class_weight=1.0, mask_weight=20.0, dice_weight=1.0
)
COMBINATIONS = [
    LossConfig(matching=matching, supervision=supervision, mask_loss=mask_loss, num_points=80)
    for matching, supervision, mask_loss in product(("points", "masks"), ("points", "masks"), ("bce", "focal"))
]
COUNTS = {"two images": (3, 5), "one empty": (0, 4), "all empty": (0, 0), "more targets than queries": (9, 2)}


def scene(counts, *, size=(38, 52), layers=2, dtype=torch.uint8, seed=0) -> tuple[Predictions, Targets]:
    g = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts) + 2
    height, width = (-(-side // 4) for side in size)
    predictions = Predictions(
        torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=g).requires_grad_(),
        torch.randn(LAYERS, images, QUERIES, 6, generator=g).requires_grad_(),
        torch.randn(images, 6, height, width, generator=g).requires_grad_(),
    )
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    cells = torch.randint(0, most + 1, (images, layers, 5, 6), generator=g).float()
    id_maps = F.interpolate(cells, size, mode="nearest").to(dtype)
    id_maps[..., -4:] = ignore_id(dtype)  # padding of a smaller image
    targets = Targets(
        id_maps=id_maps,
        labels=torch.randint(0, CLASSES, (images, most), generator=g) * valid,
        layer=torch.arange(most).expand(images, most) % layers,
        local_id=torch.arange(1, most + 1).expand(images, most) * valid,
        valid=valid,
        weight=torch.ones(images),
        dataset=torch.zeros(images, dtype=torch.int64),
        position=torch.arange(images) + 7,
    )
    return predictions, targets


def dense_masks(targets: Targets, image: int) -> torch.Tensor:
    """Return the masks [T, H, W] of one image."""
    chosen = targets.valid[image]
    pairs = zip(targets.layer[image][chosen], targets.local_id[image][chosen], strict=True)
    masks = [targets.id_maps[image, layer] == local_id for layer, local_id in pairs]
    return torch.stack(masks).float() if masks else torch.zeros(0, *targets.id_maps.shape[-2:])


def ours(predictions, targets, config, normalizers=None):
    normalizers = normalizers or count_normalizers(targets, QUERIES, config)
    return compute_losses(predictions, targets, CounterPoints(seed=2), normalizers, config, CLASSES)


def take(predictions, targets, images):
    p = Predictions(
        predictions.class_logits[:, images], predictions.mask_embeddings[:, images], predictions.mask_features[images]
    )
    return p, Targets(*(getattr(targets, f.name)[images] for f in dataclasses.fields(targets)))


def pixel_loss(logits, labels, kind):
    """Return the loss of every pixel, computed from probabilities by its definition."""
    p = logits.double().sigmoid()
    t = labels.double()
    if kind == "bce":
        return -(t * p.log() + (1 - t) * (1 - p).log())
    hit = p * t + (1 - p) * (1 - t)
    return (0.25 * t + 0.75 * (1 - t)) * (1 - hit) ** 2 * -(t * p.log() + (1 - t) * (1 - p).log())


def dice_loss(logits, labels):
    p, t = logits.double().sigmoid(), labels.double()
    return 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


def at_points(maps, points):
    """Return values [M, P] of maps [M, h, w] at points [M or 1, P, 2]."""
    grid = (2 * points - 1).expand(len(maps), -1, -1)[:, None]
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]


def reference_terms(predictions, targets, config):
    """Return unweighted mask and dice terms [L, 2] from dense masks, one pair at a time, at the same points as ours."""
    uncertain = int(config.num_points * config.importance_sample_ratio)
    counts = PointCounts(
        config.num_points, int(config.num_points * config.oversample_ratio), config.num_points - uncertain
    )
    drawn = CounterPoints(seed=2).draw(targets.position, LAYERS, counts)
    terms = torch.zeros(LAYERS, 2, dtype=torch.float64)
    for layer, image in product(range(LAYERS), range(len(targets.labels))):
        masks, labels = dense_masks(targets, image), targets.labels[image][targets.valid[image]]
        logits = predictions.mask_logits(layer)[image].detach()
        classes = predictions.class_logits[layer, image].detach().softmax(-1)
        if config.matching == "points":
            x, t = (at_points(maps, drawn.matching[layer, image][None]) for maps in (logits, masks))
        else:
            x = logits.flatten(1)
            t = F.interpolate(masks[:, None], logits.shape[-2:], mode="nearest").flatten(1)
        cost = torch.zeros(QUERIES, len(masks), dtype=torch.float64)
        for query, target in product(range(QUERIES), range(len(masks))):
            cost[query, target] = (
                config.mask_weight * pixel_cost(x[query], t[target], config.mask_loss)
                + config.dice_weight * dice_loss(x[query], t[target])
                - config.class_weight * classes[query, labels[target]]
            )
        for query, target in zip(*linear_sum_assignment(cost), strict=True):
            if config.supervision == "masks":
                x = F.interpolate(logits[query][None, None], masks.shape[-2:], mode="bilinear").flatten()
                t = masks[target].flatten()
            else:
                row = RowIndex(*(torch.tensor([i]) for i in (layer, image, target)))
                proposed, fresh = (points[:] for points in drawn.of_rows(row))
                nearest = at_points(logits[query][None], proposed)[0].abs().argsort()[:uncertain]
                chosen = torch.cat([proposed[:, nearest], fresh], dim=1)
                x, t = at_points(logits[query][None], chosen)[0], at_points(masks[target][None], chosen)[0]
            terms[layer, 0] += pixel_loss(x, t, config.mask_loss).mean()
            terms[layer, 1] += dice_loss(x, t)
    return terms / max(1, int(targets.valid.sum()))


def pixel_cost(logits, labels, kind):
    """Return the matching cost: the losses for labels 1 and 0, weighted by soft labels. Hard labels give the loss."""
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    t = labels.double()
    return (t * pixel_loss(logits, ones, kind) + (1 - t) * pixel_loss(logits, zeros, kind)).mean()


@pytest.mark.parametrize("config", COMBINATIONS, ids=lambda c: f"{c.matching}-{c.supervision}-{c.mask_loss}")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_all_combinations_equal_the_reference_arithmetic(config, counts):
    predictions, targets = scene(counts)
    losses = ours(predictions, targets, config)
    expected = reference_terms(predictions, targets, config) * torch.tensor([config.mask_weight, config.dice_weight])
    torch.testing.assert_close(losses.terms[:, 1:].double(), expected, rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(losses.total, predictions[:3]):  # raises if the graph is cut
        assert gradient.isfinite().all()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
def test_losses_on_whole_masks_equal_those_of_maskformer_in_transformers(counts, dtype):
    predictions, targets = scene(counts, dtype=dtype)
    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    matcher = hf.MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    criterion = hf.MaskFormerLoss(CLASSES, matcher, weights, eos_coef=0.1)
    masks = [dense_masks(targets, image) for image in range(len(counts))]
    labels = [targets.labels[image][targets.valid[image]] for image in range(len(counts))]
    expected = torch.stack(
        [
            torch.stack([weights[name] * terms[name] for name in weights])
            for layer in range(LAYERS)
            for terms in [criterion(predictions.mask_logits(layer), predictions.class_logits[layer], masks, labels)]
        ]
    )
    losses = ours(predictions, targets, MASKFORMER)
    torch.testing.assert_close(losses.terms, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(total, predictions[:3]) for total in (losses.total, expected.sum())), strict=True)
    for actual, wanted in pairs:
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm().clamp(min=1e-12)


@pytest.mark.parametrize("config", COMBINATIONS[2:], ids=lambda c: f"{c.matching}-{c.supervision}-{c.mask_loss}")
def test_any_grouping_gives_the_same_step(config):
    predictions, targets = scene((4, 0, 9, 2))
    whole = ours(predictions, targets, config)
    groups = [slice(0, 1), slice(1, 4)]
    counts = [count_normalizers(take(predictions, targets, group)[1], QUERIES, config) for group in groups]
    step = Normalizers(*(sum(values) for values in zip(*counts, strict=True)))
    parts = [ours(*take(predictions, targets, group), config, step) for group in groups]
    torch.testing.assert_close(sum(part.terms for part in parts), whole.terms, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat([part.per_image for part in parts]), whole.per_image, rtol=1e-6, atol=0)
    totals = (sum(part.total for part in parts), whole.total)
    for actual, wanted in zip(*(torch.autograd.grad(total, predictions[:3]) for total in totals), strict=True):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


def test_losses_do_not_depend_on_chunking_of_masks(monkeypatch):
    predictions, targets = scene((3, 5))
    whole = ours(predictions, targets, MASKFORMER)
    for module in ("m2f.model.loss.matcher", "m2f.model.loss.criterion"):
        monkeypatch.setattr(f"{module}.chunk_elements", lambda device: 1000)
    pieces = ours(predictions, targets, MASKFORMER)
    torch.testing.assert_close(pieces.terms, whole.terms, rtol=1e-5, atol=0)
    for actual, wanted in zip(
        *(torch.autograd.grad(losses.total, predictions[:3]) for losses in (pieces, whole)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_non_finite_cost_of_whole_masks_gives_a_non_finite_loss():
    predictions, targets = scene((3, 4))
    with torch.no_grad():
        predictions.mask_embeddings[1, 1, 4] = torch.nan
    losses = ours(predictions, targets, MASKFORMER)
    assert losses.per_image.isfinite().tolist() == [True, False]
