"""Compute fp32 matrix products with oneDNN on CPUs for which torch's default library has no AVX-512 code.

Torch multiplies fp32 matrices with MKL, which uses AVX2 on AMD processors. oneDNN, which torch contains as well, uses
AVX-512 there. On one core of an AMD EPYC, 2688 x 256 by 256 x 1024 takes 6 instead of 14 ms.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

_CPU_INFO = Path("/proc/cpuinfo")
_TOLERANCE = 1e-5
"""Largest error of the test product, relative to its largest value."""


@contextmanager
def fast_cpu_products(device: torch.device) -> Iterator[None]:
    """Let oneDNN compute fp32 products and 1 x 1 convolutions while the context is active, if it is faster here.

    Other devices are not affected. The choice depends only on the processor, so restarts on the same machine give the
    same bits.
    """
    if device.type == "cpu" and is_onednn_faster():
        with onednn_products():
            yield
    else:
        yield


@functools.cache
def is_onednn_faster() -> bool:
    """Return whether the processor has AVX-512 and is not from Intel, and oneDNN passes a test."""
    has_libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_libraries or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _CPU_INFO.exists() and "GenuineIntel" not in _CPU_INFO.read_text() and _is_correct()


@contextmanager
def onednn_products() -> Iterator[None]:
    """Replace torch's CPU kernels of `mm`, `addmm` and 1 x 1 convolutions in this process while the context is active.

    Other data types than fp32 and other convolutions still reach torch's own code. Contexts of several threads may
    overlap; the kernels return with the end of the last one.
    """
    _replacement.enter()
    try:
        yield
    finally:
        _replacement.leave()


class _Replacement:
    """Replaced kernels, counted because torch refuses to replace a kernel twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts = 0
        self._library: Library | None = None

    def enter(self) -> None:
        """Count a context; the first one replaces the kernels."""
        with self._lock:
            if self._library is None:
                _use_up_warning()
                self._library = Library("aten", "IMPL")
                self._library.impl("mm", _mm, "CPU")
                self._library.impl("addmm", _addmm, "CPU")
                self._library.impl("_slow_conv2d_forward", _convolve, "CPU")
                self._library.impl("_slow_conv2d_backward.output_mask", _convolve_backward, "CPU")
            self._contexts += 1

    def leave(self) -> None:
        """Remove a context; the last one restores the kernels."""
        with self._lock:
            self._contexts -= 1
            if self._contexts == 0 and self._library is not None:
                self._library._destroy()
                self._library = None


_replacement = _Replacement()
"""The replacement of this process."""


@functools.cache
def _use_up_warning() -> None:
    """Replace a kernel for a moment, because torch 2.11 warns when a process does so for the first time."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("mm", _mm, "CPU")
    library._destroy()


def _is_correct() -> bool:
    """Return whether oneDNN's product has the expected interface and result."""
    left, right = torch.linspace(-1, 1, 6 * 32).view(6, 32), torch.linspace(1, 3, 32 * 5).view(32, 5)
    expected = left.double() @ right.double()
    try:
        return bool((_product(left, right).double() - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    except (AttributeError, RuntimeError, TypeError):  # the operation is not part of torch's public interface
        return False


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left [M, K] times right [K, N], plus bias [N]. Transposed operands are not copied."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")


def _is_supported(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in tensors)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """CPU kernel of `aten::mm`. Unsupported inputs go to the kernel with an output argument, which is not replaced."""
    if _is_supported(left, right):
        return _product(left, right)
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """CPU kernel of `aten::addmm`."""
    is_bias = added.shape == right.shape[1:] and beta == 1 and alpha == 1
    if is_bias and _is_supported(added, left, right):
        return _product(left, right, added)
    output = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(added, left, right, beta=beta, alpha=alpha, out=output)


def _is_pointwise(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    return (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0)


def _convolve(
    images: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """CPU kernel of `aten::_slow_conv2d_forward`: a convolution of images [B, C, H, W].

    Torch calls it for 1 x 1 convolutions if it has one thread. The result has the memory format of the images.
    """
    if not _is_pointwise(kernel, stride, padding) or not _is_supported(images, weight):
        return torch.ops.aten._slow_conv2d_forward.output(
            images, weight, kernel, bias, stride, padding, output=images.new_empty(0)
        )
    matrix = weight.flatten(1)
    if images.is_contiguous(memory_format=torch.channels_last):
        return _maps(_product(_pixels(images), matrix.T, bias), images)
    products = _stack([_product(matrix, image) for image in images.flatten(2)])
    if bias is not None:
        products += bias[:, None]
    return products.unflatten(2, images.shape[2:])


def _convolve_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """CPU kernel of `aten::_slow_conv2d_backward`: the gradients of images, weight and bias that are needed."""
    if not _is_pointwise(kernel, stride, padding) or not _is_supported(gradient, images, weight):
        empty = [gradient.new_empty(0) if is_needed else None for is_needed in output_mask]
        return torch.ops.aten._slow_conv2d_backward.grad_input(
            gradient, images, weight, kernel, stride, padding,
            grad_input=empty[0], grad_weight=empty[1], grad_bias=empty[2],
        )  # fmt: skip
    matrix = weight.flatten(1)
    of_images = of_weight = None
    if images.is_contiguous(memory_format=torch.channels_last):
        rows = _pixels(gradient)
        if output_mask[0]:
            of_images = _maps(_product(rows, matrix), images)
        if output_mask[1]:
            of_weight = _product(rows.T, _pixels(images)).view_as(weight)
    else:
        maps = gradient.flatten(2)
        if output_mask[0]:
            of_images = _stack([_product(matrix.T, one) for one in maps]).view_as(images)
        if output_mask[1]:
            products = [_product(one, image.T) for one, image in zip(maps, images.flatten(2), strict=True)]
            of_weight = functools.reduce(Tensor.add_, products).view_as(weight)
    return of_images, of_weight, gradient.sum((0, 2, 3)) if output_mask[2] else None


def _stack(matrices: list[Tensor]) -> Tensor:
    """Return matrices [M, N] as [B, M, N], without a copy if there is only one."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _pixels(maps: Tensor) -> Tensor:
    """Return maps [B, C, H, W] as [B * H * W, C]; a view if they are channels-last."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(pixels: Tensor, like: Tensor) -> Tensor:
    """Return pixels [B * H * W, C] as channels-last maps [B, C, H, W] with the batch and size of `like`."""
    return pixels.unflatten(0, (len(like), *like.shape[2:])).permute(0, 3, 1, 2)
