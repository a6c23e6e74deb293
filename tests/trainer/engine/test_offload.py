from types import SimpleNamespace

import torch

from m2f.trainer.engine.offload import bring_norms_to_host


def test_norms_come_to_the_host_in_one_copy_with_the_same_bits(monkeypatch):
    norms = {number: (torch.rand(7) * 10.0**-number).double().norm(2) for number in range(5)}
    optimizer = SimpleNamespace(norm_for_param_grads=dict(norms))
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or to_host(tensor))
    bring_norms_to_host(optimizer)
    assert copies == [(5,)]
    assert {k: v.item() for k, v in optimizer.norm_for_param_grads.items()} == {k: v.item() for k, v in norms.items()}
