"""Layers whose form depends on the machine give equal results in every form."""

import pytest
import torch
from torch import nn

from m2f.model.layers import DoubleSize


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_double_size_equals_the_transposed_convolution(memory_format, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    layer, reference = DoubleSize(6, 5), nn.ConvTranspose2d(6, 5, 2, stride=2)
    reference.load_state_dict(layer.state_dict())
    maps = torch.randn(2, 6, 7, 9).contiguous(memory_format=memory_format)
    results = []
    for module in (layer, reference):
        inputs = maps.clone().requires_grad_()
        outputs = module(inputs)
        outputs.square().sum().backward()
        results.append([outputs, inputs.grad, module.weight.grad, module.bias.grad])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
