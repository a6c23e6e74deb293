from types import SimpleNamespace

import pytest
import torch

from m2f.trainer.engine.offload import OffloadedScalars


def test_norms_come_to_the_host_in_one_copy_with_the_same_bits(monkeypatch):
    norms = {number: (torch.rand(7) * 10.0**-number).double().norm(2) for number in range(5)}
    optimizer = SimpleNamespace(norm_for_param_grads=dict(norms))
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or to_host(tensor))
    OffloadedScalars(optimizer).bring_to_host()
    assert copies == [(5,)]
    assert {k: v.item() for k, v in optimizer.norm_for_param_grads.items()} == {k: v.item() for k, v in norms.items()}


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, None])
def test_gradients_that_are_not_finite_are_told_of_once_after_the_backward_pass(bad):
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
    scalars.bring_to_host()
    assert optimizer.local_overflow == (bad is not None)
    optimizer.local_overflow = False  # as DeepSpeed does after a step
    scalars.bring_to_host()
    assert not optimizer.local_overflow
