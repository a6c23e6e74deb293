"""Products and 1 x 1 convolutions of oneDNN equal those of torch's own kernels, which return afterwards."""

import subprocess
import sys
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from m2f.model import cpu_products
from m2f.model.cpu_products import fast_cpu_products, onednn_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """With several threads, torch does not call the kernel of 1 x 1 convolutions that is replaced."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def is_replaced():
    with patch.object(cpu_products, "_product", side_effect=cpu_products._product) as own_product:
        torch.ones(2, 3) @ torch.ones(3, 4)
    return own_product.called


def outputs_and_gradients(compute, *inputs):
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    outputs = compute(*inputs)
    (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
    return outputs, *(x.grad for x in inputs)


def assert_equal(compute, *inputs, tolerance=1e-5):
    expected = outputs_and_gradients(compute, *inputs)
    with onednn_products():
        actual = outputs_and_gradients(compute, *inputs)
    for one, other in zip(actual, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))
    return actual, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("images", [(4, 7), (2, 3, 7), (1, 7)], ids=str)
def test_linear_layers_are_equal(images, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in (images, (5, 7), (5,)))
    assert_equal(F.linear, x, weight, bias)
    assert_equal(F.linear, x, weight)


@pytest.mark.parametrize(("left", "right"), product((False, True), repeat=2))
def test_transposed_operands_are_equal(left, right):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 9, generator=g), torch.randn(9, 4, generator=g)
    a, b = (a.T.contiguous().T if left else a), (b.T.contiguous().T if right else b)
    assert_equal(torch.mm, a, b)


def test_sums_that_are_not_a_bias_reach_the_own_kernel():
    g = torch.Generator().manual_seed(0)
    added, a, b = (torch.randn(shape, generator=g) for shape in ((6, 4), (6, 9), (9, 4)))
    assert_equal(lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=2), added, a, b)
    assert_equal(torch.addmm, added, a, b)


def test_empty_operands_are_accepted():
    with onednn_products():
        assert torch.mm(torch.zeros(0, 3), torch.zeros(3, 4)).shape == (0, 4)
        assert torch.equal(torch.mm(torch.zeros(2, 0), torch.zeros(0, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("images", [1, 3])
def test_convolutions_are_equal(images, kernel, stride, dtype, memory_format, with_bias):
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(images, 6, 8, 7, generator=g).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(5, 6, kernel, kernel, generator=g).to(dtype)
    bias = (torch.randn(5, generator=g).to(dtype),) if with_bias else ()

    def convolve(x, *parameters):
        return F.conv2d(x, *parameters, stride=stride, padding=kernel // 2)

    (output, gradient, *_), (expected, *_) = assert_equal(convolve, maps, weight, *bias)
    assert output.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)
    assert expected.is_contiguous(memory_format=memory_format)


def test_gradients_that_are_not_needed_are_not_computed():
    maps, weight = torch.randn(2, 6, 8, 7), torch.randn(5, 6, 1, 1, requires_grad=True)
    with onednn_products():
        F.conv2d(maps, weight).sum().backward()
    assert weight.grad is not None
    with onednn_products(), torch.inference_mode():
        assert F.conv2d(maps, weight).shape == (2, 5, 8, 7)


def test_bf16_autocast_is_unchanged():
    a, b = torch.randn(4, 7), torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(a, b)
        with onednn_products():
            assert torch.equal(F.linear(a, b), expected)


def test_own_kernels_return_after_overlapping_contexts():
    assert not is_replaced()
    first, second = onednn_products(), onednn_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_replaced()
    second.__exit__(None, None, None)
    assert not is_replaced()


@pytest.mark.parametrize(
    ("capability", "processor", "device", "is_used"),
    [
        ("AVX512", "AuthenticAMD", CPU, True),
        ("AVX2", "AuthenticAMD", CPU, False),
        ("AVX512", "GenuineIntel", CPU, False),
        ("AVX512", "AuthenticAMD", torch.device("cuda"), False),
    ],
)
def test_products_are_replaced_only_on_processors_that_gain(
    capability, processor, device, is_used, monkeypatch, tmp_path
):
    info = tmp_path / "cpuinfo"
    info.write_text(f"vendor_id\t: {processor}\n")
    monkeypatch.setattr(cpu_products, "_CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "is_onednn_faster", cpu_products.is_onednn_faster.__wrapped__)
    with fast_cpu_products(device):
        assert is_replaced() == is_used


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_the_operation_keeps_its_own_kernels(error, monkeypatch):
    def missing(*_):
        raise error

    monkeypatch.setattr(cpu_products, "_product", missing)
    assert not cpu_products._is_correct()


def test_nothing_is_printed():
    code = "from m2f.model.cpu_products import onednn_products\nwith onednn_products(): pass"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")
