"""Sampling at points against torch's grid_sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.model.loss.point_sampling import LabelMaps, most_uncertain, sample_features, sample_maps
from m2f.model.structures import ignore_id


def grid_sampled(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return values [B, C, P] of maps [B, C, H, W] at points [B, P, 2]."""
    return F.grid_sample(maps, points[:, :, None] * 2 - 1, mode="bilinear", padding_mode="zeros", align_corners=False)[
        ..., 0
    ]


@pytest.fixture(params=[False, True], ids=["fast", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_sample_maps_and_its_gradient():
    maps = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    points = torch.cat((torch.rand(3, 20, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(3, 2, 2)), 1).double()
    torch.testing.assert_close(sample_maps(maps, points), grid_sampled(maps[:, None], points)[:, 0])
    assert torch.autograd.gradcheck(lambda m: sample_maps(m, points), maps)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 16)])
def test_features_equal_grid_sample(size):
    features = torch.randn(2, 6, *size)
    points = torch.cat(
        (torch.rand(3, 2, 40, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).expand(3, 2, 3, 2)), 2
    )
    sampled = sample_features(features.permute(0, 2, 3, 1), points)
    expected = torch.stack([grid_sampled(features, p).transpose(1, 2) for p in points])
    torch.testing.assert_close(sampled, expected, rtol=1e-6, atol=1e-6)


@st.composite
def label_scenes(draw):
    images, layers, targets = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 5))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.tensor([0, 1, 2, 3, ignore_id(dtype) - 1, ignore_id(dtype)], dtype=dtype)
    id_maps = ids[torch.randint(0, len(ids), (images, layers, height, width), generator=g)]
    layer = torch.randint(0, layers, (images, targets), generator=g)
    local_id = ids[1:-1][torch.randint(0, 4, (images, targets), generator=g)].long()
    points = torch.rand(2, images, 17, 2, generator=g)
    borders = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]]).expand(2, images, 4, 2)
    return id_maps, layer, local_id, torch.cat((points, borders), dim=2)


@settings(max_examples=60, deadline=None)
@given(label_scenes())
def test_labels_equal_grid_sample_of_one_hot_masks(scene):
    id_maps, layer, local_id, points = scene
    images = torch.arange(len(id_maps))[:, None]
    masks = (id_maps[images, layer] == local_id[..., None, None]).float()  # [B, N, H, W]
    expected = torch.stack([grid_sampled(masks, p) for p in points])
    label_maps = LabelMaps.pack(id_maps)

    assert torch.equal(label_maps.images(layer, local_id, points), expected)

    row_map = (images * id_maps.shape[1] + layer).flatten()
    row_points = points[:, :, None].expand(-1, -1, layer.shape[1], -1, -1)
    for layer_points, layer_expected in zip(row_points, expected, strict=True):
        rows = label_maps.rows(row_map, local_id.flatten(), layer_points.flatten(0, 1))
        assert torch.equal(rows, layer_expected.flatten(0, 1))


def test_most_uncertain_points_are_selected():
    logits = torch.tensor([[3.0, -0.1, 0.5, -2.0], [0.0, 9.0, -9.0, 1.0]])
    assert most_uncertain(logits, 2).sort(1).values.tolist() == [[1, 2], [0, 3]]
