from types import SimpleNamespace

import pytest
import torch

from m2f.trainer.engine.offload import OffloadedScalars


def test_norms_are_copied_to_the_host_in_one_exact_copy(monkeypatch):
    norms = {number: (torch.rand(7) * 10.0**-number).double().norm(2) for number in range(5)}
    optimizer = SimpleNamespace(norm_for_param_grads=dict(norms))
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or to_host(tensor))
    OffloadedScalars(optimizer).transfer_to_host()
    assert copies == [(5,)]
    assert {k: v.item() for k, v in optimizer.norm_for_param_grads.items()} == {k: v.item() for k, v in norms.items()}


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, None])
def test_non_finite_gradients_are_reported_once_after_the_backward_pass(bad):
    optimizer = SimpleNamespace(
        norm_for_param_grads={},
        local_overflow=False,
        update_offload_overflow_tracker=None,
        _has_inf_or_nan=lambda gradient: ~gradient.isfinite().all(),
    )
    scalars = OffloadedScalars(optimizer)
    for gradient in (torch.ones(3), None, torch.tensor([0.0, bad or 1.0])):
        optimizer.update_offload_overflow_tracker(gradient)
    assert not optimizer.local_overflow
    scalars.transfer_to_host()
    assert optimizer.local_overflow == (bad is not None)
    optimizer.local_overflow = False  # DeepSpeed resets it after each step
    scalars.transfer_to_host()
    assert not optimizer.local_overflow
