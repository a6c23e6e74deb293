"""Matching against transformers' matcher and against exhaustive search; ties, empty images, non-finite costs."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from transformers.models.mask2former import modeling_mask2former as hf

from m2f.model.config import LossConfig
from m2f.model.loss import matcher
from m2f.model.loss.matcher import assign, match, matching_cost
from m2f.model.loss.point_sampling import LabelMaps, chunk_elements
from m2f.model.structures import Predictions, Targets

CLASSES, QUERIES, LAYERS, POINTS = 5, 8, 3, 64
CONFIG = LossConfig(num_points=POINTS)


def scene(
    counts, *, pad=1, seed=0, size=(30, 44), num_points=POINTS
) -> tuple[Predictions, Targets, LabelMaps, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    images, most = len(counts), max(counts) + pad
    predictions = Predictions(
        torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=g),
        torch.randn(LAYERS, images, QUERIES, 6, generator=g),
        torch.randn(images, 6, 9, 11, generator=g),
    )
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    cells = torch.randint(0, most + 1, (images, 1, 6, 8), generator=g).float()
    targets = Targets(
        id_maps=torch.nn.functional.interpolate(cells, size, mode="nearest").to(torch.uint8),
        labels=torch.randint(0, CLASSES, (images, most), generator=g) * valid,
        layer=torch.zeros(images, most, dtype=torch.int64),
        local_id=torch.arange(1, most + 1).expand(images, most) * valid,
        valid=valid,
        weight=torch.ones(images),
        dataset=torch.zeros(images, dtype=torch.int64),
        position=torch.arange(images),
    )
    points = torch.rand(LAYERS, images, num_points, 2, generator=g)
    return predictions, targets, LabelMaps.pack(targets.id_maps), points


@pytest.mark.parametrize("num_points", [POINTS, 3 * POINTS], ids=["fewer points than pixels", "more"])
@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (8, 11), (12,)], ids=str)
def test_matching_equals_that_of_transformers(counts, num_points, monkeypatch):
    predictions, targets, label_maps, points = scene(counts, num_points=num_points)
    query_index = match(predictions, targets, label_maps, points, CONFIG).query_index
    oracle = hf.Mask2FormerHungarianMatcher(
        CONFIG.class_weight, CONFIG.mask_weight, CONFIG.dice_weight, num_points=num_points
    )
    for layer in range(LAYERS):
        draws = iter(points[layer])
        monkeypatch.setattr(torch, "rand", lambda *a, draws=draws, **k: next(draws)[None])
        masks = [
            (targets.id_maps[b] == targets.local_id[b, targets.valid[b], None, None]).float()
            for b in range(len(counts))
        ]
        labels = [targets.labels[b, targets.valid[b]] for b in range(len(counts))]
        pairs = oracle(predictions.mask_logits(layer), predictions.class_logits[layer], masks, labels)
        for image, (queries, columns) in enumerate(pairs):
            expected = torch.full((targets.valid.shape[1],), -1)
            expected[columns] = queries
            assert query_index[layer, image].tolist() == expected.tolist()
            assert (expected >= 0).sum() == min(QUERIES, counts[image])


@pytest.mark.parametrize("layers", [1, 3])
def test_sampling_dense_logits_equals_multiplying_sampled_features(layers):
    g = torch.Generator().manual_seed(0)
    embeddings, features = torch.randn(layers, 2, QUERIES, 6, generator=g), torch.randn(2, 9, 11, 6, generator=g)
    points = torch.rand(layers, 2, POINTS, 2, generator=g)
    expected = matcher._multiply_sampled_features(embeddings, features, points)
    actual = matcher._sample_dense_logits(embeddings, features, points)
    assert expected.shape == (layers, 2, QUERIES, POINTS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_points", [POINTS, 3 * POINTS])
def test_matching_does_not_depend_on_layer_chunks(num_points, monkeypatch):
    inputs = scene((3, 5), num_points=num_points)
    monkeypatch.setattr("m2f.model.loss.matcher.chunk_elements", lambda device: 10**9)
    whole = matching_cost(*inputs, CONFIG)
    monkeypatch.setattr("m2f.model.loss.matcher.chunk_elements", lambda device: 1)
    assert chunk_elements(torch.device("cpu")) > 1
    torch.testing.assert_close(matching_cost(*inputs, CONFIG), whole, rtol=1e-6, atol=1e-6)


def test_cost_is_fp32_under_autocast():
    predictions, *rest = scene((3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = matching_cost(predictions, *rest, CONFIG)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, matching_cost(predictions, *rest, CONFIG))


def test_identical_queries_are_matched_from_the_lowest_index():
    predictions, targets, label_maps, points = scene((3,))
    copied = Predictions(
        predictions.class_logits[:, :, :1].expand(-1, -1, QUERIES, -1),
        predictions.mask_embeddings[:, :, :1].expand(-1, -1, QUERIES, -1),
        predictions.mask_features,
    )
    query_index = match(copied, targets, label_maps, points, CONFIG).query_index
    assert query_index.tolist() == [[[0, 1, 2, -1]]] * LAYERS


@pytest.mark.parametrize("seed", range(20))
def test_assign_returns_the_first_of_the_cheapest_assignments(seed):
    """Among the cheapest assignments, the sum of query indices, weighted most for the first targets, is minimal."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 3, size=(6, 3)).astype(np.float32)
    cost = np.concatenate((cost, cost[:2]))  # duplicates two queries
    best = min(
        permutations(range(len(cost)), 3),
        key=lambda queries: (
            sum(cost[q, n] for n, q in enumerate(queries)),
            sum(q * (3 - n) for n, q in enumerate(queries)),
        ),
    )
    found = assign(cost)
    assert cost[found, range(3)].sum() == cost[list(best), range(3)].sum()
    assert sum(q * (3 - n) for n, q in enumerate(found)) == sum(q * (3 - n) for n, q in enumerate(best))


def test_copy_of_a_query_is_assigned_only_after_the_original():
    cost = np.random.default_rng(0).normal(5, 2, size=(100, 60)).astype(np.float32)
    found = set(assign(np.concatenate((cost, cost))).tolist())
    assert all(q - 100 in found for q in found if q >= 100)
    assert any(q >= 100 for q in found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_cost_is_reported_and_still_assigned(bad):
    predictions, targets, label_maps, points = scene((3, 4))
    predictions.mask_embeddings[2, 0, 5] = bad
    matching = match(predictions, targets, label_maps, points, CONFIG)
    assert matching.finite.tolist() == [[True, True], [True, True], [False, True]]
    assert (matching.query_index >= 0).sum((0, 2)).tolist() == [3 * LAYERS, 4 * LAYERS]
    again = match(predictions, targets, label_maps, points, CONFIG)
    assert np.array_equal(matching.query_index, again.query_index)
    assert sorted(assign(np.full((4, 3), bad, dtype=np.float32))) == [0, 1, 2]
