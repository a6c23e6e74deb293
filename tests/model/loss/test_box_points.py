"""Box points equal a slow reference, give unbiased sums over many draws, and do not depend on other images."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f.model.config import LossConfig
from m2f.model.errors import ConfigError
from m2f.model.loss import criterion, matcher
from m2f.model.loss.box_points import (
    assign_to_boxes,
    box_weights,
    importance_density,
    move_into_boxes,
    share_within,
    target_boxes,
)
from m2f.model.loss.criterion import compute_losses, count_normalizers, point_counts
from m2f.model.loss.mask_losses import pairwise_sums, row_losses
from m2f.model.loss.points import CounterPoints, RowIndex
from m2f.model.structures import Predictions, Targets, ignore_id

CLASSES, QUERIES, LAYERS = 5, 7, 2
BOTH = LossConfig(num_points=81, matching_box_share=0.5, supervision_box_share=0.5)
DRAWS = 10_000
Z_LIMIT = 4.5
"""Allowed error of a mean of independent draws, in standard errors. Each of some hundred tests fails by chance with a
probability of 7e-6."""


def rectangles(*images, size=(24, 40), layers=1, dtype=torch.uint8, pad=1) -> Targets:
    """Return targets from (left, top, width, height) in pixels; None gives a target without pixels.

    Target n lies in layer n modulo the number of layers, and covers earlier ones there. The last two columns are
    padding of the image.
    """
    most = max(map(len, images)) + pad
    id_maps = torch.zeros(len(images), layers, *size, dtype=dtype)
    valid = torch.zeros(len(images), most, dtype=torch.bool)
    for b, boxes in enumerate(images):
        for n, box in enumerate(boxes):
            valid[b, n] = True
            if box is not None:
                left, top, width, height = box
                id_maps[b, n % layers, top : top + height, left : left + width] = n + 1
    id_maps[..., -2:] = ignore_id(dtype)
    number = torch.arange(most).expand(len(images), -1)
    return Targets(
        id_maps=id_maps,
        labels=number % CLASSES * valid,
        layer=number % layers * valid,
        local_id=(number + 1) * valid,
        valid=valid,
        weight=torch.ones(len(images)),
        dataset=torch.zeros(len(images), dtype=torch.int64),
        position=torch.arange(len(images)) + 7,
    )


def predictions_for(targets: Targets, seed=0) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    images, (height, width) = len(targets.labels), targets.id_maps.shape[-2:]
    return Predictions(
        torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=g).requires_grad_(),
        torch.randn(LAYERS, images, QUERIES, 6, generator=g).requires_grad_(),
        torch.randn(images, 6, height // 4, width // 4, generator=g).requires_grad_(),
    )


TINY = (11, 7, 1, 1)
CORNER = (0, 0, 3, 2)
BORDER = (30, 20, 8, 4)
WIDE = (2, 12, 30, 3)
LARGE = (6, 3, 20, 16)
SCENES = {
    "several sizes": {"images": [[LARGE, TINY, CORNER], [BORDER, WIDE, TINY, LARGE, CORNER]]},
    "one empty image": {"images": [[], [TINY, LARGE]]},
    "all images empty": {"images": [[], []]},
    "no place for a target": {"images": [[], []], "pad": 0},
    "a target without a pixel": {"images": [[None, TINY], [CORNER]]},
    "more targets than queries": {"images": [[(x, y, 5, 6) for x in range(0, 36, 8) for y in (2, 13)]]},
    "more targets than box points": {"images": [[(x, y, 1, 1) for x in range(0, 38, 3) for y in range(0, 24, 4)]]},
    "overlapping instances": {"images": [[LARGE, WIDE, TINY, BORDER], [LARGE, CORNER, TINY]], "layers": 3},
    "many ids": {"images": [[LARGE, TINY], [WIDE]], "dtype": torch.int16},
    "a whole map": {"images": [[(0, 0, 40, 24), TINY]]},
}


def scene(name: str) -> Targets:
    options = dict(SCENES[name])
    return rectangles(*options.pop("images"), **options)


def mask_of(targets: Targets, image: int, target: int) -> Tensor:
    """Return the mask [H, W] bool of a target."""
    return targets.id_maps[image, targets.layer[image, target]] == targets.local_id[image, target]


def box_of(targets: Targets, image: int, target: int) -> tuple[float, float, float, float]:
    """Return the target's box: tight around the pixels, grown by half a side but at least four pixels, and clipped."""
    mask = mask_of(targets, image, target)
    if not targets.valid[image, target] or not mask.any():
        return 0.0, 0.0, 1.0, 1.0
    ends = []
    for axis, size in ((1, mask.shape[1]), (0, mask.shape[0])):
        occupied = mask.any(1 - axis).nonzero().flatten().tolist()
        low, high = occupied[0], occupied[-1] + 1
        growth = max(4, (high - low) / 2)
        ends.append((max(0.0, (low - growth) / size), min(1.0, (high + growth) / size)))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def is_inside(point: Tensor, box: tuple[float, ...]) -> bool:
    tolerance = 1e-6  # a point's coordinates are rounded to fp32
    x, y = point.tolist()
    return box[0] - tolerance <= x <= box[2] + tolerance and box[1] - tolerance <= y <= box[3] + tolerance


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def scale_into(points: Tensor, box: tuple[float, ...]) -> Tensor:
    low, high = (torch.tensor(corner, dtype=torch.float32) for corner in (box[:2], box[2:]))
    return low + points * (high - low)


def at_points(values: Tensor, points: Tensor) -> Tensor:
    """Return values [P] float64 of a map [h, w] at points [P, 2]."""
    grid = (2 * points.double() - 1)[None, None]
    return F.grid_sample(values.double()[None, None], grid, align_corners=False)[0, 0, 0]


def weighted_terms(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted mean BCE and weighted dice loss."""
    p = logits.sigmoid()
    bce = -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits))
    overlap, both = (weights * p * labels).sum(), (weights * p).sum() + (weights * labels).sum()
    return (weights * bce).mean(), 1 - (2 * overlap + 1) / (both + 1)


def reference_terms(predictions: Predictions, targets: Targets, config: LossConfig) -> Tensor:
    """Return weighted mask and dice terms [L, 2]. Every density is the mean of the densities of the single draws."""
    drawn = CounterPoints(seed=2).draw(targets.position, LAYERS, point_counts(config))
    terms = torch.zeros(LAYERS, 2, dtype=torch.float64)
    for layer, image in product(range(LAYERS), range(len(targets.labels))):
        count = int(targets.valid[image].sum())
        logits = predictions.mask_logits(layer)[image].detach()
        classes = predictions.class_logits[layer, image].detach().double().softmax(-1)
        points, weights = reference_matching_points(drawn.matching[layer, image], targets, image, config)
        cost = torch.zeros(QUERIES, count, dtype=torch.float64)
        for query, target in product(range(QUERIES), range(count)):
            labels = at_points(mask_of(targets, image, target).float(), points)
            mask, dice = weighted_terms(at_points(logits[query], points), labels, weights)
            cost[query, target] = (
                config.mask_weight * mask
                + config.dice_weight * dice
                - config.class_weight * classes[query, targets.labels[image, target]]
            )
        for target, query in enumerate(matcher.assign(cost.numpy())):  # ties go to the lowest query
            if query < 0:
                continue
            row = RowIndex(*(torch.tensor([i]) for i in (layer, image, target)))
            candidates, fresh = (points[:][0] for points in drawn.of_rows(row))
            box = box_of(targets, image, target)
            points, weights = reference_row_points(logits[query], candidates, fresh, box, config)
            labels = at_points(mask_of(targets, image, target).float(), points)
            terms[layer] += torch.stack(weighted_terms(at_points(logits[query], points), labels, weights))
    return terms / max(1, int(targets.valid.sum())) * torch.tensor([config.mask_weight, config.dice_weight])


def reference_matching_points(
    points: Tensor, targets: Targets, image: int, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Return matching points [P, 2] and weights [P]. The last points are assigned to the targets in turn."""
    boxes = [box_of(targets, image, n) for n in range(int(targets.valid[image].sum()))] or [(0.0, 0.0, 1.0, 1.0)]
    uniform = len(points) - int(len(points) * config.matching_box_share)
    owners = [None if i < uniform else boxes[(i - uniform) % len(boxes)] for i in range(len(points))]
    placed = [point if box is None else scale_into(point, box) for point, box in zip(points, owners, strict=True)]
    densities = [
        sum(1.0 if box is None else is_inside(point, box) / area(box) for box in owners) / len(points)
        for point in placed
    ]
    return torch.stack(placed), 1 / torch.tensor(densities, dtype=torch.float64)


def reference_row_points(logits: Tensor, candidates: Tensor, fresh: Tensor, box: tuple[float, ...], config: LossConfig):
    """Return points [P, 2] and weights [P] of one row: official points, then those in the box."""
    in_box = int(config.num_points * config.supervision_box_share)
    official = config.num_points - in_box
    kept = int(official * config.importance_sample_ratio)
    distance = at_points(logits, candidates).abs()
    nearest = distance.argsort()[:kept]
    points = torch.cat((candidates[nearest], fresh[: official - kept], scale_into(fresh[official - kept :], box)))
    weights = []
    limit = distance[nearest].max() + 1e-6 if kept else torch.tensor(-1.0)
    for point, x in zip(points, at_points(logits, points), strict=True):
        omega = ((official - kept) + (len(candidates) if abs(x) <= limit else 0)) / official
        q = (official * omega + in_box * is_inside(point, box) / area(box)) / config.num_points
        weights.append(omega / q)
    return points, torch.tensor(weights, dtype=torch.float64)


def losses_of(predictions: Predictions, targets: Targets, config: LossConfig, seed=2):
    normalizers = count_normalizers(targets, predictions.class_logits.shape[2], config)
    return compute_losses(predictions, targets, CounterPoints(seed), normalizers, config, CLASSES)


@pytest.mark.parametrize("name", SCENES)
def test_boxes_equal_the_reference(name):
    targets = scene(name)
    boxes = target_boxes(targets)
    assert boxes.shape == (*targets.labels.shape, 4)
    for image, target in product(*map(range, targets.labels.shape)):
        assert boxes[image, target].tolist() == pytest.approx(box_of(targets, image, target), abs=1e-7)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize(
    "config",
    [BOTH, replace(BOTH, supervision_box_share=0.0), replace(BOTH, matching_box_share=0.0, supervision_box_share=0.3)],
    ids=["both", "matching", "supervision"],
)
def test_losses_equal_the_reference_arithmetic(name, config):
    targets = scene(name)
    predictions = predictions_for(targets)
    losses = losses_of(predictions, targets, config)
    expected = reference_terms(predictions, targets, config)
    torch.testing.assert_close(losses.terms[:, 1:].double(), expected, rtol=2e-5, atol=1e-6)
    for gradient in torch.autograd.grad(losses.total, predictions[:3]):  # raises if the graph is cut
        assert gradient.isfinite().all()


def fine_grid(size: int) -> Tensor:
    """Return the midpoints [size * size, 2] of the cells of a grid on the unit square."""
    at = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)


def example_row(box, *, seed=0, shift=-6.0) -> tuple[Tensor, Targets]:
    """Return noisy logits [8, 8], highest on the target, and the target on 32 x 32 pixels."""
    targets = rectangles([box], size=(32, 32), pad=0)
    seen = F.avg_pool2d(mask_of(targets, 0, 0).float()[None, None], 4)[0, 0]
    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    return shift + 2 * noise + 8 * seen / seen.max(), targets


def repeated(targets: Targets, images: int) -> Targets:
    """Return the same image at `images` positions of the data order."""
    copies = {f.name: getattr(targets, f.name).repeat_interleave(images, dim=0) for f in fields(targets)}
    return Targets(**(copies | {"position": torch.arange(images)}))


SUMS = ("loss", "overlap", "area")
ROWS = {"one pixel": (13, 9, 1, 1), "at the border": (0, 28, 3, 4), "long": (4, 16, 22, 2), "large": (4, 4, 20, 24)}


def sums_of_draws(logits: Tensor, targets: Targets, config: LossConfig, monkeypatch, layers=100) -> Tensor:
    """Return weighted means [DRAWS, 3] of loss, overlap and area as computed in training.

    Every prediction of every image is one draw.
    """
    seen = []

    def spy(x, y, kind, weights=None):
        w = torch.ones_like(x) if weights is None else weights
        bce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        seen.append(torch.stack([(w * v).double().mean(1) for v in (bce, x.sigmoid() * y, x.sigmoid() + y)], -1))
        return row_losses(x, y, kind, weights)

    monkeypatch.setattr(criterion, "row_losses", spy)
    images = DRAWS // layers
    predictions = Predictions(
        torch.zeros(layers, images, 1, CLASSES + 1), torch.ones(layers, images, 1, 1), logits.expand(images, 1, -1, -1)
    )
    losses_of(predictions, repeated(targets, images), config)
    (found,) = seen
    assert len(found) == DRAWS
    return found


def dense_sums(logits: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """Return integrals [3] over the image with density 1, or that of importance sampling from infinite candidates."""
    grid = fine_grid(32 * 32)
    x, y = at_points(logits, grid), at_points(mask_of(targets, 0, 0).float(), grid)
    omega = torch.ones_like(x)
    if config.importance_sample_ratio:
        ratio, share = config.importance_sample_ratio, config.importance_sample_ratio / config.oversample_ratio
        omega = (1 - ratio) + ratio / share * (x.abs() <= x.abs().kthvalue(int(len(x) * share)).values)
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return torch.stack([(omega * v).mean() for v in (bce, x.sigmoid() * y, x.sigmoid() + y)])


@pytest.mark.parametrize("box", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_loss_sums_are_unbiased_against_all_pixels(box, share, monkeypatch):
    logits, targets = example_row(box)
    config = LossConfig(num_points=33, importance_sample_ratio=0.0, supervision_box_share=share)
    found = sums_of_draws(logits, targets, config, monkeypatch)
    error = found.mean(0) - dense_sums(logits, targets, config)
    z = error / found.std(0) * DRAWS**0.5
    assert z.abs().max() < Z_LIMIT, dict(zip(SUMS, z.tolist(), strict=True))


@pytest.mark.parametrize("box", ROWS.values(), ids=ROWS)
def test_sums_keep_the_density_of_importance_sampling(box, monkeypatch):
    """Compare with sums over all pixels, weighted by the density of importance sampling.

    The density's threshold is a quantile of the candidates. Its noise causes a bias inversely proportional to the
    number of points.
    """
    logits, targets = example_row(box)
    config = LossConfig(num_points=256, supervision_box_share=0.5)
    found = sums_of_draws(logits, targets, config, monkeypatch)
    dense = dense_sums(logits, targets, config)
    error = found.mean(0) - dense
    assert (error.abs() < Z_LIMIT * found.std(0) / DRAWS**0.5 + 0.01 * dense).all(), error / dense


@pytest.mark.parametrize("box", [ROWS["one pixel"], ROWS["at the border"]], ids=["one pixel", "at the border"])
def test_box_points_reduce_the_variance_of_small_targets(box, monkeypatch):
    logits, targets = example_row(box)
    spread = []
    for share in (0.0, 0.5):
        config = LossConfig(num_points=64, importance_sample_ratio=0.0, supervision_box_share=share)
        spread.append(sums_of_draws(logits, targets, config, monkeypatch).std(0))
    assert spread[1][1] < 0.4 * spread[0][1]  # standard deviation of the overlap


@pytest.mark.parametrize("boxes", [list(ROWS.values()), [ROWS["one pixel"]], [ROWS["large"], None]], ids=len)
@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_matching_sums_are_unbiased_against_all_pixels(boxes, kind, monkeypatch):
    """All pairs of a draw share its 41 points, of which 20 lie in boxes."""
    targets = rectangles(boxes, size=(32, 32))
    queries = torch.stack([example_row(ROWS["large"])[0], example_row(ROWS["one pixel"], seed=1)[0]])
    seen = []

    def spy(x, y, kind, weights=None):
        seen.append(pairwise_sums(x.clone().double(), y.double(), kind, weights.double()))
        return pairwise_sums(x, y, kind, weights)

    monkeypatch.setattr(matcher, "pairwise_sums", spy)
    layers, images = 100, DRAWS // 100
    predictions = Predictions(
        torch.zeros(layers, images, 2, CLASSES + 1),
        torch.eye(2).expand(layers, images, 2, 2),
        queries.expand(images, -1, -1, -1),
    )
    config = LossConfig(num_points=41, matching_box_share=0.5, mask_loss=kind)
    losses_of(predictions, repeated(targets, images), config)
    found = torch.cat([torch.stack(sums[:3], -1).flatten(0, 1) for sums in seen]) / 41  # [draws, Q, N, 3]
    assert len(found) == DRAWS

    grid = fine_grid(32 * 16)
    x = torch.stack([at_points(query, grid) for query in queries])
    y = torch.stack([at_points(mask_of(targets, 0, n).float(), grid) for n in range(len(boxes))])
    dense = torch.stack(pairwise_sums(x, y, kind)[:3], -1) / len(grid)
    error = found[:, :, : len(boxes)].mean(0) - dense
    noise = found[:, :, : len(boxes)].std(0) / DRAWS**0.5
    assert (error.abs() <= Z_LIMIT * noise + 1e-9).all(), error / noise


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_point_weights_are_bounded_by_the_share_outside_boxes(share):
    g = torch.Generator().manual_seed(0)
    targets = scene("several sizes")
    boxes, count = target_boxes(targets), 64
    in_box = int(count * share)
    most = count / (count - in_box)
    _, weights = assign_to_boxes(torch.rand(3, 2, count, 2, generator=g), boxes, targets.valid, in_box)
    assert 0 < weights.min() < 0.5
    assert weights.max() <= most * (1 + 1e-6)
    rows = boxes.flatten(0, 1)
    logits = torch.randn(len(rows), count, generator=g)
    omega = importance_density(logits, 20, count - in_box - 20, torch.full((len(rows),), 0.25))
    weights = box_weights(torch.rand(len(rows), count, 2, generator=g), rows, omega, in_box)
    assert weights.max() <= most * (1 + 1e-6)


def test_points_moved_into_a_box_count_as_inside_it():
    low, high = torch.rand(2, 1000, 2, generator=torch.Generator().manual_seed(0)).sort(0).values
    boxes = torch.cat((low, high), -1)
    for ends in (0.0, 1 - 2.0**-23):
        points = move_into_boxes(torch.full((1000, 1, 2), ends), boxes[:, None])
        assert (box_weights(points, boxes, 1.0, 1) < 1).all()


def test_a_flat_map_is_sampled_evenly():
    """All candidates are equally uncertain, so all points have density 1."""
    logits = torch.full((1, 40), -3.0)
    share = share_within(logits, torch.arange(10)[None])
    assert share.tolist() == [1]
    assert importance_density(logits[:, :20], 10, 10, share).tolist() == [[1.0] * 20]


def row_loss_inputs(predictions, targets, config, monkeypatch) -> list[Tensor]:
    """Return the arguments of the criterion's mask losses: logits, labels and, if given, weights [R, P]."""
    seen = []

    def spy(x, y, kind, weights=None):
        seen.extend((x.detach(), y) if weights is None else (x.detach(), y, weights))
        return row_losses(x, y, kind, weights)

    monkeypatch.setattr(criterion, "row_losses", spy)
    losses_of(predictions, targets, config)
    return seen


def take(predictions: Predictions, targets: Targets, images) -> tuple[Predictions, Targets]:
    p = Predictions(
        predictions.class_logits[:, images], predictions.mask_embeddings[:, images], predictions.mask_features[images]
    )
    return p, Targets(*(getattr(targets, f.name)[images] for f in fields(targets)))


def test_loss_points_do_not_depend_on_other_images(monkeypatch):
    targets = scene("several sizes")
    padded = rectangles(*SCENES["several sizes"]["images"], pad=6)
    predictions = predictions_for(targets)
    together = row_loss_inputs(predictions, targets, BOTH, monkeypatch)
    assert len(together) == 3
    alone = [row_loss_inputs(*take(predictions, padded, [b]), BOTH, monkeypatch) for b in range(2)]
    for whole, *parts in zip(together, *alone, strict=True):
        assert torch.equal(whole[:, 40:], torch.cat(parts)[:, 40:])  # the kept points are in no particular order
        assert torch.equal(whole[:, :40].sort(1).values, torch.cat(parts)[:, :40].sort(1).values)


def test_matching_points_and_weights_do_not_depend_on_other_images():
    targets = scene("several sizes")
    padded = rectangles(*SCENES["several sizes"]["images"], pad=6)
    points = CounterPoints(seed=2).draw(targets.position, LAYERS, point_counts(BOTH)).matching
    whole, weights = assign_to_boxes(points, target_boxes(targets), targets.valid, 40)
    for image in range(2):
        _, alone = take(predictions_for(padded), padded, [image])
        part, part_weights = assign_to_boxes(points[:, [image]], target_boxes(alone), alone.valid, 40)
        assert torch.equal(part[:, 0], whole[:, image])
        torch.testing.assert_close(part_weights[:, 0], weights[:, image], rtol=1e-6, atol=0)


def test_box_points_leave_other_random_points_unchanged():
    targets, rows = scene("several sizes"), RowIndex(*(torch.tensor([i]) for i in (1, 0, 2)))
    plain, boxed = (
        CounterPoints(seed=2).draw(targets.position, LAYERS, point_counts(config))
        for config in (LossConfig(num_points=80), replace(BOTH, num_points=80))
    )
    assert torch.equal(plain.matching, boxed.matching)
    for ours, official in zip(boxed.of_rows(rows), plain.of_rows(rows), strict=True):
        few = min(ours.base.shape[1], official.base.shape[1])
        assert torch.equal(ours[:][:, :few], official[:][:, :few])


def test_points_have_no_weights_by_default(monkeypatch):
    targets = scene("several sizes")
    monkeypatch.setattr(criterion, "target_boxes", None)
    assert len(row_loss_inputs(predictions_for(targets), targets, LossConfig(num_points=64), monkeypatch)) == 2


@pytest.mark.parametrize("use", ["matching", "supervision"])
def test_wrong_settings_are_refused(use):
    for share in (-0.1, 0.6, float("nan")):
        with pytest.raises(ConfigError, match=f"{use}_box_share is .* at most 0.5"):
            LossConfig(**{f"{use}_box_share": share})
    with pytest.raises(ConfigError, match=f"set model.loss.{use}=points"):
        LossConfig(**{f"{use}_box_share": 0.5, use: "masks"})
