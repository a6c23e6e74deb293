"""Select PyTorch's fused attention kernels by comparing them with the plain formula on this GPU.

On recent GPUs PyTorch prefers cuDNN. Its kernel has returned wrong gradients with masks: NaN for lengths with remainder
64 modulo 128 (pytorch#196678). Therefore each process tests every kernel once on its own GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_IMAGES, _HEADS, _QUERIES = 2, 8, 100
"""Size of the trial inputs: few images, to be quick, and the heads and queries of the paper."""
_UNSUPPORTED_INPUT = ("No available kernel", "No viable backend")


class Backend(NamedTuple):
    """A fused attention kernel that accepts masks."""

    name: str
    """Name in messages."""
    kind: SDPBackend
    allow: Callable[[bool], None]
    """Enable (True) or disable (False) the kernel in this process."""


BACKENDS = (
    Backend("cuDNN", SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.enable_cudnn_sdp),
    Backend("memory-efficient", SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.enable_mem_efficient_sdp),
)
"""Kernels in PyTorch's order of preference on recent GPUs. FlashAttention is missing because it accepts no mask."""


class Case(NamedTuple):
    """Test case: attention of `queries` queries to `tokens` tokens, with a boolean or an added mask."""

    dtype: torch.dtype
    tokens: int
    dim: int
    """Channels per head."""
    is_additive: bool = False
    """Whether the mask is added to the logits instead of being boolean."""
    queries: int = _QUERIES

    def __str__(self) -> str:
        mask = "an additive mask" if self.is_additive else "a boolean mask"
        return f"{self.tokens} tokens of {self.dim} channels in {str(self.dtype).removeprefix('torch.')} with {mask}"


CASES = (
    Case(torch.bfloat16, 1024, 32),
    Case(torch.bfloat16, 1050, 32),  # 25 x 42: neither side is a multiple of 4
    Case(torch.bfloat16, 1600, 32),  # remainder 64 modulo 128
    Case(torch.bfloat16, 1600, 32, is_additive=True),
    Case(torch.bfloat16, 1600, 64),
    Case(torch.bfloat16, 1129, 64, queries=1129),  # self-attention over all tokens of a transformer
    Case(torch.float16, 1600, 32),
    Case(torch.float32, 1600, 32),
)


@functools.cache
def select_attention_backends(device: torch.device) -> str | None:
    """Disable the fused kernels that are wrong on this GPU, with a warning for each.

    Return one line that names the kernels in use. On a CPU nothing is tested, and the result is None.
    """
    return None if device.type != "cuda" else disable_wrong_backends(device, BACKENDS)


def disable_wrong_backends(device: torch.device, backends: tuple[Backend, ...]) -> str:
    """Test `backends` and disable the wrong ones; see `select_attention_backends`."""
    correct: list[str] = []
    wrong: list[str] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for backend in backends:
            problem = first_problem(backend, device)
            if problem is None:
                correct.append(backend.name)
            elif problem:
                backend.allow(False)
                wrong.append(backend.name)
                warnings.warn(
                    f"PyTorch's {backend.name} attention is disabled on this GPU: {problem}; using the next "
                    "kernel instead",
                    stacklevel=2,
                )
    found = " or ".join(correct) if correct else "matrix products, which are slower"
    return f"masked attention uses {found}" + (f"; {' and '.join(wrong)} failed the check" if wrong else "")


def first_problem(backend: Backend, device: torch.device) -> str | None:
    """Return the first problem of a backend.

    Return None if it is right in all cases that it supports, and an empty string if it supports none.
    """
    is_supported = False
    for case in CASES:
        try:
            error = _error(backend, case, device)
        except torch.OutOfMemoryError:
            raise  # does not show that the kernel is wrong
        except RuntimeError as problem:
            if any(text in str(problem) for text in _UNSUPPORTED_INPUT):
                continue
            return f"{case}: {problem}"
        is_supported = True
        if not error <= (1e-4 if case.dtype == torch.float32 else 0.05):  # also true for NaN
            return f"{case}: error is {error:.2g} of the largest value"
    return None if is_supported else ""


@torch.inference_mode(False)  # the first use may be an evaluation, but the check needs gradients
@torch.enable_grad()
def _error(backend: Backend, case: Case, device: torch.device) -> float:
    """Return the largest relative difference of output and gradients from the plain formula.

    Each difference is relative to the largest value of its tensor.
    """
    torch.manual_seed(0)

    def heads(length: int) -> Tensor:  # the same strides as in the model, where heads are slices of the channels
        rows = torch.randn(_IMAGES, length, _HEADS * case.dim, device=device).to(case.dtype)
        return rows.unflatten(-1, (_HEADS, -1)).transpose(1, 2).requires_grad_()

    inputs = [heads(case.queries), heads(case.tokens), heads(case.tokens)]
    if case.is_additive:
        added = torch.randn(_IMAGES, _HEADS, case.queries, case.tokens, device=device).to(case.dtype)
        mask = added.requires_grad_()
        inputs.append(mask)
    else:
        mask = torch.rand(_IMAGES, 1, case.queries, case.tokens, device=device) < 0.1
        mask[:, :, 0] = True
    cotangent = torch.randn(_IMAGES, _HEADS, case.queries, case.dim, device=device).to(case.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns why a kernel does not support an input
        with sdpa_kernel([backend.kind]):
            output = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], attn_mask=mask)
            found = (output.detach(), *torch.autograd.grad(output, inputs, cotangent))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    plain = plain_attention(exact[0], exact[1], exact[2], exact[3] if case.is_additive else mask)
    expected = (plain.detach(), *torch.autograd.grad(plain, exact, cotangent.double()))
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Compute softmax attention step by step as a reference.

    `query` is [B, heads, Q, D]; `key` and `value` are [B, heads, T, D]. `mask` [B, heads or 1, Q, T] is bool, True
    where attention is allowed, or a float that is added to the logits. Return [B, heads, Q, D].
    """
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ value
