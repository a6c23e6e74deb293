"""Counter-based points: uniform, independent, and determined by the seed and the sample's position."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m2f.model.loss.points import CounterPoints, GivenPoints, PointCounts, RowIndex


def every_row(layers: int, images: int, targets: int) -> RowIndex:
    axes = torch.meshgrid(torch.arange(layers), torch.arange(images), torch.arange(targets), indexing="ij")
    return RowIndex(*(axis.flatten() for axis in axes))


def draw(source: CounterPoints, position: torch.Tensor, *, layers=3, targets=4, points=50):
    """Return matching points [L, B, P, 2], and candidates and fresh points [L, B, N, P, 2]."""
    shape = (layers, len(position), targets, points, 2)
    drawn = source.draw(position, layers, PointCounts(points, points, points))
    candidates, fresh = drawn.of_rows(every_row(layers, len(position), targets))
    return drawn.matching, candidates[:].view(shape), fresh[:].view(shape)


def test_points_depend_only_on_their_keys():
    source = CounterPoints(seed=7)
    position = torch.tensor([5, 2**40, 0])
    together = draw(source, position)
    for image in range(3):
        alone = draw(CounterPoints(seed=7), position[[image]], layers=2, targets=3, points=31)
        assert torch.equal(alone[0][:, 0], together[0][:2, image, :31])
        for few, many in zip(alone[1:], together[1:], strict=True):
            assert torch.equal(few[:, 0], many[:2, image, :3, :31])


def test_points_do_not_depend_on_row_order_and_slicing():
    drawn = CounterPoints(seed=7).draw(torch.tensor([5, 6]), 2, PointCounts(9, 20, 3))
    rows = every_row(2, 2, 3)
    order = torch.randperm(len(rows.layer), generator=torch.Generator().manual_seed(0))
    shuffled, _ = drawn.of_rows(RowIndex(*(axis[order] for axis in rows)))
    unshuffled = drawn.of_rows(rows)[0][:]
    assert torch.equal(shuffled[:], unshuffled[order])
    assert torch.equal(torch.cat([shuffled[0:5], shuffled[5:12]]), shuffled[:])


def test_different_keys_give_different_points():
    position = torch.tensor([1, 2])
    sets = [t for seed in (0, 1, 2**63) for t in draw(CounterPoints(seed), position)]
    flat = torch.cat([t.reshape(-1, 50, 2) for t in sets])
    assert len(flat.unique(dim=0)) == len(flat)


@pytest.mark.parametrize("kind", range(3), ids=["matching", "candidates", "fresh"])
def test_points_are_uniform_and_independent(kind):
    points = draw(CounterPoints(seed=3), torch.arange(40), points=500)[kind].reshape(-1, 500, 2).double()
    assert points.min() >= 0
    assert points.max() < 1
    count = points[..., 0].numel()
    cells = torch.histc(points[..., 0] * 16 // 1 * 16 + points[..., 1] * 16 // 1, bins=256, min=0, max=255)
    if kind == 0:  # other rows share a base set and are dependent, so chi-square holds only for single rows
        chi_square = ((cells - count / 256) ** 2 / (count / 256)).sum()
        assert 160 < chi_square < 370  # 255 degrees of freedom, +-5 standard deviations
    chi_per_row = torch.stack([torch.histc(row, bins=20, min=0, max=1) for row in points[:, :, 0]])
    mean_chi_square = ((chi_per_row - 25) ** 2 / 25).sum(1).mean()
    assert mean_chi_square == pytest.approx(19, abs=2)
    centred = points - 0.5
    for left, right in ((centred[..., 0], centred[..., 1]), (centred[:, 1:, 0], centred[:, :-1, 0])):
        correlation_per_row = (left * right).mean(1) * 12
        assert correlation_per_row.mean().abs() < 0.02
        assert correlation_per_row.std() == pytest.approx(500**-0.5, rel=0.25)
    between_rows = (centred[1:, :, 0] * centred[:-1, :, 1]).mean(1) * 12
    assert between_rows.mean().abs() < 0.02


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_depend_on_the_batch():
    counts = []
    for images, layers, targets in ((1, 1, 1), (8, 10, 25)):
        position, rows = torch.arange(images), every_row(layers, images, targets)
        with CountOperations() as operations:
            drawn = CounterPoints(seed=1).draw(position, layers, PointCounts(64, 64, 64))
            for points in drawn.of_rows(rows):
                points[:]
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_given_points_are_returned_by_row():
    matching, candidates, fresh = torch.rand(2, 3, 5, 2), torch.rand(2, 3, 4, 6, 2), torch.rand(2, 3, 4, 7, 2)
    source = GivenPoints(matching, candidates, fresh)
    rows = RowIndex(torch.tensor([1, 0]), torch.tensor([2, 1]), torch.tensor([3, 0]))
    drawn = source.draw(torch.zeros(3, dtype=torch.int64), 2, PointCounts(5, 6, 7))
    assert torch.equal(drawn.matching, matching)
    of_rows = drawn.of_rows(rows)
    assert torch.equal(of_rows[0][:], torch.stack((candidates[1, 2, 3], candidates[0, 1, 0])))
    assert torch.equal(of_rows[1][1:], fresh[0, 1, 0][None])
