"""The criterion against that of transformers, and its own guarantees: grouping, empty images, non-finite costs."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.model.config import LossConfig
from m2f.model.loss import criterion, matcher
from m2f.model.loss.criterion import Losses, Normalizers, compute_losses, count_normalizers
from m2f.model.loss.points import CounterPoints
from m2f.model.structures import Predictions, Targets, ignore_id
from tests.model.loss_oracle import CLASSES, make_predictions, make_targets, transformers_losses

SMALL = LossConfig(num_points=96)
MASKS = LossConfig(matching="masks", supervision="masks")
BOXES = LossConfig(num_points=96, matching_box_share=0.5, supervision_box_share=0.5)


def take(targets: Targets, images: slice) -> Targets:
    return Targets(*(getattr(targets, f.name)[images] for f in fields(targets)))


def take_predictions(predictions: Predictions, images: slice) -> Predictions:
    return Predictions(
        predictions.class_logits[:, images], predictions.mask_embeddings[:, images], predictions.mask_features[images]
    )


def ours(predictions, targets, config=SMALL, points=None, normalizers=None) -> Losses:
    points = points or CounterPoints(seed=1)
    normalizers = normalizers or count_normalizers(targets, predictions.class_logits.shape[2], config)
    return compute_losses(predictions, targets, points, normalizers, config, CLASSES)


def gradients(loss: torch.Tensor, predictions: Predictions) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, predictions[:3]))


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
def test_losses_and_gradients_equal_those_of_transformers(case, class_norm, monkeypatch):
    config = LossConfig(num_points=96, class_norm=class_norm)
    targets = make_targets(**case)
    predictions = make_predictions(len(case["counts"]))
    masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
    terms, points = transformers_losses(predictions.class_logits, masks, targets, config, monkeypatch)
    expected = terms * torch.tensor([config.class_weight, config.mask_weight, config.dice_weight])

    losses = ours(predictions, targets, config, points)

    torch.testing.assert_close(losses.terms, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.total, expected.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.per_image.sum(), losses.total)
    pairs = zip(gradients(losses.total, predictions), gradients(expected.sum(), predictions), strict=True)
    for actual, wanted in pairs:
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm().clamp(min=1e-12)


@pytest.mark.parametrize("config", [SMALL, BOXES, MASKS], ids=["uniform points", "box points", "masks"])
def test_separate_feature_maps_per_prediction_give_the_same_losses(config):
    targets, shared = make_targets((4, 0, 6)), make_predictions(3)
    last, *earlier = (shared.mask_features.detach().clone().requires_grad_() for _ in shared.class_logits)
    own = Predictions(shared.class_logits, shared.mask_embeddings, last, tuple(earlier))

    whole, losses = ours(shared, targets, config), ours(own, targets, config)

    torch.testing.assert_close(losses.terms, whole.terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(own.mask_logits(1), shared.mask_logits(1), rtol=0, atol=0)
    inputs = [own.class_logits, own.mask_embeddings, *own.feature_maps]
    classes, embeddings, *features = torch.autograd.grad(losses.total, inputs)
    actuals = [classes, embeddings, torch.stack(features).sum(0)]
    for actual, wanted in zip(actuals, gradients(whole.total, shared), strict=True):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("config", [SMALL, BOXES], ids=["uniform points", "box points"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)], ids=str)
def test_any_grouping_of_images_gives_the_same_step(sizes, config):
    targets, predictions = make_targets((4, 0, 11, 2)), make_predictions(4)
    whole = ours(predictions, targets, config)
    ends = list(accumulate(sizes))
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    counts = [count_normalizers(take(targets, group), 9, SMALL) for group in groups]
    step = Normalizers(*(sum(values) for values in zip(*counts, strict=True)))
    losses = [ours(take_predictions(predictions, g), take(targets, g), config, normalizers=step) for g in groups]

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


def test_images_of_weight_zero_do_not_contribute():
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


def test_loss_of_a_micro_batch_of_weight_zero_is_zero():
    targets, predictions = make_targets((3,)), make_predictions(1)
    empty = replace(targets, weight=torch.zeros(1))
    assert [float(n) for n in count_normalizers(empty, 9, SMALL)] == [0, 0, 0]
    losses = ours(predictions, empty)
    assert losses.total == 0
    assert not any(g.any() for g in gradients(losses.total, predictions))


@pytest.mark.parametrize("config", [SMALL, BOXES], ids=["uniform points", "box points"])
@pytest.mark.parametrize("pad", [0, 1])
def test_without_targets_every_prediction_stays_in_the_graph(pad, config):
    targets, predictions = make_targets((0, 0), pad=pad), make_predictions(2)
    losses = ours(predictions, targets, config)
    class_gradient, *mask_gradients = gradients(losses.total, predictions)  # raises if the graph is cut
    assert class_gradient.abs().sum() > 0
    assert not any(g.any() for g in mask_gradients)
    assert not losses.terms[:, 1:].any()


@pytest.mark.parametrize("config", [SMALL, BOXES], ids=["uniform points", "box points"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_cost_gives_a_non_finite_loss(bad, config):
    targets, predictions = make_targets((3, 4)), make_predictions(2)
    with torch.no_grad():
        predictions.mask_embeddings[1, 1, 8] = bad  # one query of one prediction, matched or not
    losses = ours(predictions, targets, config)
    assert losses.per_image.isfinite().tolist() == [True, False]
    assert losses.terms[:, 1].isfinite().tolist() == [True, False, True]
    assert not any(g.isfinite().all() for g in gradients(losses.total, predictions)[1:])


def test_losses_do_not_depend_on_target_padding_and_other_images():
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
    low = Predictions(*(p.detach().bfloat16().requires_grad_() for p in predictions[:3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ours(low, targets)
    exact = ours(Predictions(*(p.detach().float().requires_grad_() for p in low[:3])), targets)
    assert losses.total.dtype == torch.float32
    assert torch.equal(losses.terms, exact.terms)
    assert all(g.dtype == torch.bfloat16 for g in gradients(losses.total, low))


class CountOperations(TorchDispatchMode):
    """Counts operations that would launch a kernel on an accelerator; views do not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [SMALL, BOXES], ids=["uniform points", "box points"])
@pytest.mark.parametrize("counts", [(11,), (11, 4, 8, 9), (11,) * 16], ids=len)
def test_number_of_operations_per_micro_batch_is_bounded(counts, config, monkeypatch):
    for module in (criterion, matcher):
        monkeypatch.setattr(module, "chunk_elements", lambda device: 2**27)  # chunk size of accelerators
    predictions, targets = make_predictions(len(counts)), make_targets(counts)
    normalizers = count_normalizers(targets, predictions.class_logits.shape[2], SMALL)
    with CountOperations() as forward:
        losses = ours(predictions, targets, config, normalizers=normalizers)
    with CountOperations() as backward:
        losses.total.backward()
    assert forward.count <= (306 if config is SMALL else 410)  # sums of softplus are one operation on accelerators
    assert backward.count <= 70
