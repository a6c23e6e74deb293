import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import m2f
from m2f.model.backbones.batch_norms import FrozenBatchNorm2d, SyncBatchNorm2d
from m2f.model.errors import ConfigError
from tests.waiting import PATIENCE_S

REPOSITORY = Path(m2f.__file__).parents[1]


def trained_batch_norm(channels=3):
    """Return a BatchNorm with random statistics and affine parameters."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def test_frozen_batch_norm_equals_batch_norm_in_eval_mode_and_never_changes():
    source = trained_batch_norm().double().eval()
    frozen = FrozenBatchNorm2d.from_trained(source).double().train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    features = torch.randn(2, source.num_features, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen(features), source(features), rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(norm(features).square().sum(), features)[0] for norm in (frozen, source)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)
    assert list(frozen.parameters()) == []
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert frozen(features.detach().bfloat16()).dtype == torch.bfloat16


def test_sync_batch_norm_in_one_process_is_a_batch_norm():
    source = trained_batch_norm()
    norm = SyncBatchNorm2d.like(source)
    features = torch.randn(2, 3, 5, 4)
    for is_training in (True, False):
        torch.testing.assert_close(norm.train(is_training)(features), source.train(is_training)(features))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in norm.state_dict().items())


def test_sync_batch_norm_refuses_to_train_on_a_single_value_per_channel():
    norm = SyncBatchNorm2d.like(trained_batch_norm())
    with pytest.raises(ConfigError, match=r"one image with one pixel.*images of more than 32 x 32 pixels, or set"):
        norm.train()(torch.randn(1, 3, 1, 1))
    assert norm(torch.randn(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    assert norm.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_sync_batch_norm_on_two_ranks_equals_a_batch_norm_of_all_images(tmp_path):
    source = trained_batch_norm().train()
    pixels = (torch.randn(3, 40) * 3 + 5).split((24, 16), dim=1)  # image sizes differ between the ranks
    features = [part.view(1, 3, *shape) for part, shape in zip(pixels, ((4, 6), (2, 8)), strict=True)]
    cotangents = [torch.randn_like(part) for part in features]
    torch.save({"state": source.state_dict(), "features": features, "cotangents": cotangents}, tmp_path / "given.pt")
    script = str(Path(__file__).with_name("sync_batch_norm_rank.py"))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ranks = [subprocess.Popen([sys.executable, script, rank, str(tmp_path)], env=environment) for rank in "01"]
    try:
        assert [rank.wait(timeout=PATIENCE_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    whole = torch.cat([part.flatten(2) for part in features], dim=2)[..., None].requires_grad_()
    expected = source(whole)
    (expected * torch.cat([part.flatten(2) for part in cotangents], dim=2)[..., None]).sum().backward()
    outputs, gradients, weight, bias, states = zip(
        *(torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    for parts, reference in ((outputs, expected), (gradients, whole.grad)):
        torch.testing.assert_close(torch.cat([p.flatten(2) for p in parts], dim=2)[..., None], reference, **close)
    torch.testing.assert_close(weight[0], source.weight.grad, **close)
    torch.testing.assert_close(bias[1], source.bias.grad, **close)
    for state in states:
        for key, value in source.state_dict().items():
            torch.testing.assert_close(state[key], value, **close)


def test_sync_batch_norm_on_a_single_rank_group_uses_batch_statistics(tmp_path):
    source, features = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    norm = SyncBatchNorm2d.like(source)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(norm.train()(features), source.train()(features))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(norm.state_dict(), source.state_dict())
