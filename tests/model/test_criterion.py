"""The criterion against the one in transformers, and its own promises: grouping, empty images, non-finite costs."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from transformers.models.mask2former import modeling_mask2former as hf

from model.config import LossConfig
from model.criterion import Losses, Normalizers, compute_losses, count_normalizers
from model.points import CounterPoints, GivenPoints
from model.structures import Predictions, Targets, ignore_id

CLASSES = 7
SMALL = LossConfig(num_points=96)


def make_predictions(images: int, *, layers=3, queries=9, channels=8, size=(13, 17), seed=0) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    return Predictions(
        torch.randn(layers, images, queries, CLASSES + 1, generator=g).requires_grad_(),
        torch.randn(layers, images, queries, channels, generator=g).requires_grad_(),
        torch.randn(images, channels, *size, generator=g).requires_grad_(),
    )


def make_targets(counts, *, size=(40, 56), layers=1, pad=2, seed=0, dtype=torch.uint8) -> Targets:
    """Random rectangles; where targets overlap they lie in different layers. The right and lower border is padding."""
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


def take(targets: Targets, images: slice) -> Targets:
    return Targets(*(getattr(targets, f.name)[images] for f in fields(targets)))


def take_predictions(predictions: Predictions, images: slice) -> Predictions:
    return Predictions(
        predictions.class_logits[:, images], predictions.mask_embeddings[:, images], predictions.mask_features[images]
    )


def one_hot(targets: Targets, image: int) -> torch.Tensor:
    """Dense masks [T, H, W] of one image."""
    maps = targets.id_maps[image]
    valid = targets.valid[image]
    pairs = zip(targets.layer[image][valid], targets.local_id[image][valid], strict=True)
    masks = [maps[layer] == local_id for layer, local_id in pairs]
    return torch.stack(masks).float() if masks else torch.zeros(0, *maps.shape[-2:])


def ours(predictions, targets, config=SMALL, points=None, normalizers=None) -> Losses:
    points = points or CounterPoints(seed=1)
    normalizers = normalizers or count_normalizers(targets, predictions.class_logits.shape[2], config)
    return compute_losses(predictions, targets, points, normalizers, config, CLASSES)


def gradients(loss: torch.Tensor, predictions: Predictions) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, predictions))


def transformers_losses(predictions: Predictions, targets: Targets, config: LossConfig, monkeypatch):
    """Unweighted terms [L, 3] of transformers' criterion, its assignments [L][B] and the points that it drew."""
    drawn, assigned = [], []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(rand(*a, **k)) or drawn[-1])
    settings = SimpleNamespace(
        num_labels=CLASSES,
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
    masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
    layers, images = masks.shape[:2]
    torch.manual_seed(3)
    result = criterion(
        masks[-1],
        predictions.class_logits[-1],
        [one_hot(targets, b) for b in range(images)],
        [targets.labels[b][targets.valid[b]] for b in range(images)],
        [
            {"masks_queries_logits": masks[i], "class_queries_logits": predictions.class_logits[i]}
            for i in range(layers - 1)
        ],
    )
    monkeypatch.setattr(torch, "rand", rand)
    names = ("loss_cross_entropy", "loss_mask", "loss_dice")
    suffixes = [f"_{i}" for i in range(layers - 1)] + [""]
    terms = torch.stack([torch.stack([result[name + suffix] for name in names]) for suffix in suffixes])
    order = [layers - 1, *range(layers - 1)]  # the final prediction draws first
    assignments = [assigned[order.index(layer)] for layer in range(layers)]
    return terms, assignments, replayed(drawn, assignments, order, targets)


def replayed(drawn, assignments, order, targets: Targets) -> GivenPoints:
    """Draws of the official order (per prediction: each image, candidates, fresh) by layer, image, target."""
    layers, (images, most) = len(order), targets.valid.shape
    per_layer = [drawn[i : i + images + 2] for i in range(0, len(drawn), images + 2)]
    shape = (layers, images, most)
    matching = torch.zeros(layers, images, *drawn[0].shape[1:])
    candidates = torch.zeros(*shape, *drawn[images].shape[1:])
    fresh = torch.zeros(*shape, *drawn[images + 1].shape[1:])
    for layer, draws in zip(order, per_layer, strict=True):
        matching[layer] = torch.cat(draws[:images])
        row = 0
        for image, (_, target_indices) in enumerate(assignments[layer]):
            for target in target_indices.tolist():
                candidates[layer, image, target] = draws[images][row]
                fresh[layer, image, target] = draws[images + 1][row]
                row += 1
    return GivenPoints(matching, candidates, fresh)


CASES = {
    "two images": {"counts": (4, 6)},
    "one empty image": {"counts": (0, 5)},
    "all images empty": {"counts": (0, 0)},
    "more targets than queries": {"counts": (12, 3)},
    "overlapping instances in layers": {"counts": (6, 8), "layers": 3},
    "many ids in int16": {"counts": (3, 5), "dtype": torch.int16},
    "odd size": {"counts": (5,), "size": (37, 61)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("class_norm", ["global", "per_rank"])
def test_equals_transformers(case, class_norm, monkeypatch):
    config = LossConfig(num_points=96, class_norm=class_norm)
    targets = make_targets(**case)
    predictions = make_predictions(len(case["counts"]))
    terms, _, points = transformers_losses(predictions, targets, config, monkeypatch)
    expected = terms * torch.tensor([config.class_weight, config.mask_weight, config.dice_weight])

    losses = ours(predictions, targets, config, points)

    torch.testing.assert_close(losses.terms, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.total, expected.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.per_image.sum(), losses.total)
    pairs = zip(gradients(losses.total, predictions), gradients(expected.sum(), predictions), strict=True)
    for actual, wanted in pairs:
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm().clamp(min=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)], ids=str)
def test_any_grouping_of_images_gives_the_same_step(sizes):
    targets, predictions = make_targets((4, 0, 11, 2)), make_predictions(4)
    whole = ours(predictions, targets)
    ends = list(accumulate(sizes))
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    counts = [count_normalizers(take(targets, group), 9, SMALL) for group in groups]
    step = Normalizers(*(sum(values) for values in zip(*counts, strict=True)))
    losses = [ours(take_predictions(predictions, g), take(targets, g), normalizers=step) for g in groups]

    total = sum(part.total for part in losses)
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(part.terms for part in losses), whole.terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([part.per_image for part in losses]), whole.per_image, rtol=1e-6, atol=0)
    for actual, wanted in zip(gradients(total, predictions), gradients(whole.total, predictions), strict=True):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


def test_per_rank_class_loss_is_the_mean_over_micro_batches():
    config = LossConfig(num_points=96, class_norm="per_rank")
    targets, predictions = make_targets((4, 1)), make_predictions(2)
    halves = [slice(0, 1), slice(1, 2)]
    alone = [ours(take_predictions(predictions, h), take(targets, h), config).terms[:, 0] for h in halves]
    counts = [count_normalizers(take(targets, h), 9, config) for h in halves]
    step = Normalizers(*(sum(values) for values in zip(*counts, strict=True)))
    together = [
        ours(take_predictions(predictions, h), take(targets, h), config, normalizers=step).terms[:, 0] for h in halves
    ]
    torch.testing.assert_close(sum(together), sum(alone) / 2)


def test_images_of_weight_zero_count_nowhere():
    targets, predictions = make_targets((3, 5, 4)), make_predictions(3)
    filled = replace(targets, weight=torch.tensor([1.0, 0, 1]))
    kept = [0, 2]
    counts, expected_counts = (count_normalizers(t, 9, SMALL) for t in (filled, take(targets, kept)))
    assert counts.num_masks == expected_counts.num_masks == 7
    torch.testing.assert_close(counts.class_weight_sum, expected_counts.class_weight_sum)

    losses = ours(predictions, filled)
    expected = ours(take_predictions(predictions, kept), take(targets, kept))

    torch.testing.assert_close(losses.terms, expected.terms)
    assert losses.per_image[1] == 0
    for gradient, image_axis in zip(gradients(losses.total, predictions), (1, 1, 0), strict=True):
        assert not gradient.select(image_axis, 1).any()


def test_a_micro_batch_of_weight_zero_alone_is_zero():
    targets, predictions = make_targets((3,)), make_predictions(1)
    empty = replace(targets, weight=torch.zeros(1))
    assert [float(n) for n in count_normalizers(empty, 9, SMALL)] == [0, 0, 0]
    losses = ours(predictions, empty)
    assert losses.total == 0
    assert not any(g.any() for g in gradients(losses.total, predictions))


@pytest.mark.parametrize("pad", [0, 1])
def test_without_targets_every_prediction_stays_in_the_graph(pad):
    targets, predictions = make_targets((0, 0), pad=pad), make_predictions(2)
    losses = ours(predictions, targets)
    class_gradient, *mask_gradients = gradients(losses.total, predictions)  # raises where the graph is cut
    assert class_gradient.abs().sum() > 0
    assert not any(g.any() for g in mask_gradients)
    assert not losses.terms[:, 1:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_cost_is_never_hidden(bad):
    targets, predictions = make_targets((3, 4)), make_predictions(2)
    with torch.no_grad():
        predictions.mask_embeddings[1, 1, 8] = bad  # one query of one prediction, matched or not
    losses = ours(predictions, targets)
    assert losses.per_image.isfinite().tolist() == [True, False]
    assert losses.terms[:, 1].isfinite().tolist() == [True, False, True]
    assert not any(g.isfinite().all() for g in gradients(losses.total, predictions)[1:])


def test_padding_of_targets_and_their_neighbours_change_nothing():
    targets, predictions = make_targets((4, 6)), make_predictions(2)
    alone = ours(take_predictions(predictions, slice(0, 1)), take(make_targets((4, 6), pad=9), slice(0, 1)))
    together = ours(predictions, targets, normalizers=count_normalizers(take(targets, slice(0, 1)), 9, SMALL))
    torch.testing.assert_close(alone.per_image[0], together.per_image[0], rtol=1e-6, atol=0)


def test_void_and_background_are_ordinary_negatives():
    targets, predictions = make_targets((3,)), make_predictions(1)
    void = targets.id_maps == ignore_id(torch.uint8)
    plain = replace(targets, id_maps=targets.id_maps.masked_fill(void, 0))
    assert void.any()
    assert torch.equal(ours(predictions, targets).terms, ours(predictions, plain).terms)


def test_losses_are_fp32_under_autocast():
    targets, predictions = make_targets((3, 2)), make_predictions(2)
    low = Predictions(*(p.detach().bfloat16().requires_grad_() for p in predictions))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ours(low, targets)
    exact = ours(Predictions(*(p.detach().float().requires_grad_() for p in low)), targets)
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.terms, exact.terms)
    assert all(g.dtype == torch.bfloat16 for g in gradients(losses.total, low))
