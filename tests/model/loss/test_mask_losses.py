"""Sums over pixels for all pairs of a query and a target, compared with slow references in fp64."""

import pytest
import torch
import torch.nn.functional as F

from m2f.model.loss.mask_losses import pairwise_sums


@pytest.mark.parametrize("layout", ["queries first", "points first"])
@pytest.mark.parametrize("kind", ["bce", "focal"])
@pytest.mark.parametrize("num_points", [1, 2, 3, 7, 16, 31, 80, 1023])
def test_sums_equal_those_of_every_pair(num_points, kind, layout):
    g = torch.Generator().manual_seed(num_points)
    logits = 8 * torch.randn(2, 5, num_points, generator=g)
    labels = torch.rand(2, 3, num_points, generator=g)
    x, y = logits.double()[:, :, None], labels.double()[:, None]
    losses = F.binary_cross_entropy_with_logits(x.expand(-1, -1, 3, -1), y.expand(-1, 5, -1, -1), reduction="none")
    if kind == "focal":
        hit = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
        miss = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
        p = x.sigmoid()
        losses = 0.25 * hit * (1 - p).square() * y + 0.75 * miss * p.square() * (1 - y)
    if layout == "points first":
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    sums = pairwise_sums(logits, labels, kind)
    torch.testing.assert_close(sums.loss.double(), losses.sum(-1), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(sums.overlap.double(), (x.sigmoid() * y).sum(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums.area.double(), (x.sigmoid() + y).sum(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e3, 1e30], ids=str)
def test_cross_entropy_is_exact_for_small_and_huge_logits(scale):
    """An untrained model predicts logits near 0; a certain one predicts logits whose sigmoid is 0 or 1 in fp32."""
    logits = scale * torch.linspace(-1, 1, 12544)[None]
    expected = F.softplus(logits.double(), threshold=100).sum(-1, keepdim=True)
    sums = pairwise_sums(logits, torch.zeros(1, 12544), "bce")
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_makes_the_sum_of_its_query_not_finite(bad):
    logits = torch.zeros(2, 100)
    logits[0, 37] = bad
    finite = pairwise_sums(logits, torch.zeros(1, 100), "bce").loss.isfinite()
    assert finite.tolist() == [[False], [True]]
