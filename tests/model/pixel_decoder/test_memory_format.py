"""Convolutions of pixel decoders read channels-last maps on GPUs; tested with fake CUDA tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m2f.model.config import FPNPixelDecoderConfig, MSDeformAttnPixelDecoderConfig
from m2f.model.deform_attn import module as deform_attn
from m2f.model.layers import group_norm
from m2f.model.pixel_decoder import build_pixel_decoder

DECODERS = [
    MSDeformAttnPixelDecoderConfig(
        conv_dim=16, mask_dim=16, feedforward_dim=16, num_heads=2, num_points=2, num_layers=1
    ),
    FPNPixelDecoderConfig(conv_dim=16, mask_dim=16),
]


@pytest.mark.parametrize("config", DECODERS, ids=lambda config: config.kind)
def test_every_convolution_reads_channels_last_on_a_gpu(config, monkeypatch):
    monkeypatch.setattr(deform_attn, "_checked_kernel", lambda *sizes: True)
    read = {}
    with FakeTensorMode():
        with torch.device("cuda"):
            decoder = build_pixel_decoder(config, [8] * 4)
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda module, inputs, name=name: read.update({name: inputs[0]}))
        sides = (32, 16, 8, 4)
        maps = [torch.zeros(2, 8, side, side, device="cuda") for side in sides]
        decoder([each.contiguous(memory_format=torch.channels_last) for each in maps])
    assert len(read) >= 6
    assert [name for name, maps in read.items() if not maps.is_contiguous(memory_format=torch.channels_last)] == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_group_norm_keeps_the_memory_format_and_the_bits(memory_format):
    torch.manual_seed(0)
    maps = torch.randn(2, 32, 5, 6).contiguous(memory_format=memory_format)
    norm = group_norm(32)
    found = norm(maps)
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found, nn.functional.group_norm(maps, 32, norm.weight, norm.bias, norm.eps))
