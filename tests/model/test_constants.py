"""Caches of tensors that depend only on sizes, and cases in which cached tensors must not be used."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m2f.model import constants
from m2f.model.backbones.batch_norms import FrozenBatchNorm2d
from m2f.model.constants import cache_constants, reusable_constants
from m2f.model.position_encoding import sine_position_embedding


@pytest.fixture
def counted_ones():
    """Return a function that caches two results, and the list of arguments for which it computed a result."""
    calls = []

    @cache_constants(2)
    def ones(length):
        calls.append(length)
        return torch.ones(length)

    return ones, calls


def test_most_recent_results_are_cached(counted_ones):
    ones, calls = counted_ones
    assert ones(3) is ones(3)
    ones(4), ones(5), ones(3)
    assert calls == [3, 4, 5, 3]


def test_fake_tensors_are_neither_cached_nor_replaced_by_cached_ones(counted_ones):
    ones, calls = counted_ones
    real = ones(3)
    with FakeTensorMode():
        fake = ones(3)
    assert type(fake) is not torch.Tensor
    assert ones(3) is real
    assert calls == [3, 3]


def test_graph_reads_the_constants_of_the_pass_before_its_recording(counted_ones, monkeypatch):
    ones, calls = counted_ones
    is_capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    ones(3)
    with reusable_constants() as reused:
        before = ones(3)
        is_capturing[0] = True
        assert ones(3) is before
        of_the_graph = ones(4)  # no earlier pass used it
        assert [id(constant) for constant in reused.values()] == [id(before)]
    assert ones(3) is not before
    is_capturing[0] = False
    assert ones(4) is not of_the_graph
    assert calls == [3, 4, 3, 4]


def test_constants_made_in_inference_mode_can_be_used_in_training(counted_ones):
    ones, _ = counted_ones
    with torch.inference_mode():
        ones(3)
    weight = torch.zeros(3, requires_grad=True)
    (weight * ones(3)).sum().backward()
    assert weight.grad.tolist() == [1, 1, 1]


def calls_in_graphs(function, sides, **options):
    """Compile `function` of a tensor [side, 2, 8], compare its results, and return the number of calls per graph."""
    torch.compiler.reset()
    graphs = []

    def collect(graph, inputs):
        graphs.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(function, backend=collect, **options)
    for side in sides:
        assert torch.equal(compiled(torch.ones(side, 2, 8)), function(torch.ones(side, 2, 8)))
    return graphs


def add_positions(x):
    return x + sine_position_embedding(len(x), 2, 8, x.device)


def test_compiled_function_reads_constants():
    graphs = calls_in_graphs(add_positions, (3, 4, 3), fullgraph=True, dynamic=False)
    if constants._GRAPHS_READ_CONSTANTS:
        assert graphs == [1, 1]
    else:
        assert min(graphs) > 20


def test_compiled_function_computes_tensors_of_symbolic_sizes():
    (calls,) = calls_in_graphs(add_positions, (3, 4, 3), fullgraph=True, dynamic=True)
    assert calls > 20


def test_graph_may_break_after_a_constant():
    def multiply_later(x):
        positions = sine_position_embedding(3, 2, 8, x.device)
        total = x + positions
        torch._dynamo.graph_break()
        return total * positions

    assert len(calls_in_graphs(multiply_later, (3,))) == 2


def frozen_norm():
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(nn.BatchNorm2d(4))
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    return norm


def expected(norm, features):
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    scale, shift = (row.to(features.dtype).view(1, -1, 1, 1) for row in (scale, shift))
    return torch.addcmul(shift, features, scale)


@pytest.mark.parametrize("change", ["write", "load", "cast", "replace", "copy"])
def test_constants_of_a_frozen_norm_follow_its_buffers(change):
    norm, features = frozen_norm(), torch.randn(2, 4, 3, 3)
    norm.load_state_dict(norm.state_dict())
    with torch.inference_mode():
        norm(features)
    assert norm._scale_and_shift(torch.float32)[0] is norm._scale_and_shift(torch.float32)[0]
    match change:
        case "write":
            norm.running_var.mul_(2)
        case "load":
            norm.load_state_dict({name: buffer + 1 for name, buffer in norm.state_dict().items()})
        case "cast":
            norm, features = norm.bfloat16(), features.bfloat16()
        case "replace":
            norm.weight = norm.weight + 1
        case "copy":
            norm = copy.deepcopy(norm)
            norm.load_state_dict({name: buffer + 1 for name, buffer in norm.state_dict().items()})
    features.requires_grad_()
    found = norm(features)
    found.float().sum().backward()
    assert torch.equal(found, expected(norm, features))
