"""Variants of the training step that the benchmarks time have the same loss as the step itself."""

import pytest

from benchmarks.measure import CPU
from benchmarks.peers.bench_train_step import _Case

pytestmark = pytest.mark.slow


@pytest.fixture
def case():
    return _Case(1, 64, CPU, repeats=1)


def test_step_with_known_matches_has_the_same_loss(case):
    assert case.without_matching().error < 1e-6


def test_the_official_order_has_the_same_loss(case):
    row = case.against_official_order()
    assert row.error < 1e-5
    assert row.ours_gb is not None
