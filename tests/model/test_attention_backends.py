import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from m2f.model import attention_backends
from m2f.model.attention_backends import Backend, Case, disable_wrong_backends, first_problem, select_attention_backends

CPU = torch.device("cpu")
real = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def backends(monkeypatch):
    """Return two fake backends that work on a CPU, and a dict of which are enabled. The check's cases are small."""
    cases = (Case(torch.bfloat16, 128, 8), Case(torch.bfloat16, 192, 8), Case(torch.float32, 192, 8, is_additive=True))
    monkeypatch.setattr(attention_backends, "CASES", cases)
    allowed = {"first": True, "second": True}
    kinds = {"first": SDPBackend.FLASH_ATTENTION, "second": SDPBackend.MATH}

    def make(name):
        return Backend(name, kinds[name], lambda allow: allowed.__setitem__(name, allow))

    return (make("first"), make("second")), allowed


def wrong_at(remainder, kind, wrong):
    """Return attention with wrong gradients if `kind` is enabled and the token count modulo 128 is `remainder`."""

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output: Tensor) -> Tensor:
            return output.view_as(output)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return wrong(gradient)

    def attend(query, key, value, attn_mask):
        flags = {
            SDPBackend.FLASH_ATTENTION: torch._C._get_flash_sdp_enabled,
            SDPBackend.MATH: torch._C._get_math_sdp_enabled,
        }
        output = real(query, key, value, attn_mask=attn_mask)
        return WrongGradient.apply(output) if flags[kind]() and key.shape[2] % 128 == remainder else output

    return attend


def test_correct_kernels_stay_enabled_and_are_named(backends):
    (first, second), allowed = backends
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert disable_wrong_backends(CPU, (first, second)) == "masked attention uses first or second"
    assert allowed == {"first": True, "second": True}


@pytest.mark.parametrize("wrong", [lambda g: g * torch.nan, lambda g: 1.2 * g], ids=["NaN", "a fifth"])
def test_kernel_with_wrong_gradients_is_disabled(backends, wrong, monkeypatch):
    both, allowed = backends
    monkeypatch.setattr(attention_backends.F, "scaled_dot_product_attention", wrong_at(64, both[0].kind, wrong))
    with pytest.warns(
        UserWarning, match="first attention is disabled on this GPU: 192 tokens of 8 channels in bfloat16"
    ):
        line = disable_wrong_backends(CPU, both)
    assert line == "masked attention uses second; first failed the check"
    assert allowed == {"first": False, "second": True}


def test_kernel_that_does_not_support_the_inputs_is_ignored(backends):
    (_, second), _ = backends
    absent = Backend("cuDNN", SDPBackend.CUDNN_ATTENTION, lambda allow: pytest.fail("it is not there"))
    assert first_problem(absent, CPU) == ""
    assert disable_wrong_backends(CPU, (absent, second)) == "masked attention uses second"
    assert disable_wrong_backends(CPU, (absent,)) == "masked attention uses matrix products, which are slower"


def test_kernel_that_raises_an_error_is_disabled(backends, monkeypatch):
    both, allowed = backends

    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(attention_backends.F, "scaled_dot_product_attention", broken)
    with pytest.warns(UserWarning, match="misaligned address"):
        disable_wrong_backends(CPU, both[:1])
    assert not allowed["first"]


def test_kernels_are_checked_alike_in_inference_mode(backends):
    (_, second), _ = backends
    with torch.inference_mode():
        assert first_problem(second, CPU) is None


def test_check_leaves_the_random_state_unchanged_and_is_skipped_on_cpu(backends):
    before = torch.get_rng_state()
    disable_wrong_backends(CPU, backends[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert select_attention_backends(CPU) is None
