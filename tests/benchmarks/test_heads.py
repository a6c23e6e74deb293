"""The benchmark of heads, matcher and losses runs, and its outputs agree. Its times are not checked."""

import torch

from benchmarks.peers import bench_heads


def test_ours_agrees_with_the_official_order():
    found = bench_heads._case(1, 64, 3, torch.device("cpu"), repeats=1)
    assert 0 <= found.error < 1e-3
    assert bench_heads._criteria(1, 64, 3, torch.device("cpu"), repeats=1).error < 0.5  # the sides draw other points
