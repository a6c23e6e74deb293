"""The form of deformable attention in compiled graphs for GPUs, tested with fake CUDA tensors."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import m2f.model.deform_attn.module as own
from m2f.model import constants
from m2f.model.config import MSDeformAttnPixelDecoderConfig
from m2f.model.pixel_decoder.deformable import MSDeformAttnPixelDecoder

LAYERS = 2
CONFIG = MSDeformAttnPixelDecoderConfig(
    conv_dim=16, mask_dim=16, feedforward_dim=16, num_heads=2, num_points=2, num_layers=LAYERS
)


@pytest.fixture
def graphs(monkeypatch):
    """Compile a pixel decoder for a GPU with a working kernel, normally and for export.

    Return the numbers of kernel calls and of grid_sample calls in each graph.
    """
    monkeypatch.setattr(own, "_checked_kernel", lambda *sizes: True)
    monkeypatch.setattr(constants, "_GRAPHS_READ_CONSTANTS", False)  # there is no device for constants
    torch.compiler.reset()
    seen = []

    def count(graph, inputs):
        seen.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward

    with FakeTensorMode():
        with torch.device("cuda"):
            decoder = MSDeformAttnPixelDecoder(CONFIG, [8] * 4)
        decoder.compile(backend=count, fullgraph=True, dynamic=False)
        maps = [torch.zeros(1, 8, side, side, device="cuda") for side in (16, 8, 4, 2)]
        decoder(maps)
        with own.for_export():
            decoder(maps)
        decoder(maps)
    return [(nodes["m2f.ms_deform_attn.default"], _grid_samples(nodes)) for nodes in seen]


def _grid_samples(nodes):
    return sum(count for name, count in nodes.items() if "grid_sample" in name)


def test_compiled_decoders_use_the_kernel_and_exported_ones_the_plain_form(graphs):
    assert graphs == [(LAYERS, 0), (0, 3 * LAYERS)]
