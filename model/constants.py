"""Cache for tensors that depend only on sizes. Building them would take about ten kernel launches per forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar, cast

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

_GRAPHS_READ_CONSTANTS = torch.__version__ >= "2.15"
"""Whether torch.compile can break a graph after a constant tensor. Torch 2.11 and 2.13 raise AssertionError."""

_reusable: dict[Hashable, object] | None = None
"""Constants of the current `reusable_constants` by function and arguments; None outside of it."""


@contextmanager
def reusable_constants() -> Iterator[dict[Hashable, object]]:
    """Let a CUDA graph that is recorded in this context read the constants of an earlier pass in the same context.

    Otherwise the graph computes them at every replay. Keep the yielded dict as long as the graph, because it owns the
    memory that the graph reads.
    """
    global _reusable
    _reusable = {}
    try:
        yield _reusable
    finally:
        _reusable = None


def cache_constants(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the last `size` results of a function with hashable arguments. Callers must not write to the results.

    The cache is bypassed during export, under a dispatch mode, and while a CUDA graph is recorded, except with
    `reusable_constants`. In these cases tensors may belong to a graph or have no values, so the function runs uncached.
    The result must be one tensor. A graph of torch.compile reads it as a constant, unless a size is symbolic or torch
    is older than 2.15; then the graph computes it.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=size)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.inference_mode(False):  # autograd cannot save inference tensors for a backward pass
                return make(*args, **kwargs)

        @functools.wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_dynamo_compiling() and _can_be_constant((*args, *kwargs.values())):
                return get_for_graph(*args, **kwargs)
            if not _have_values():
                return make(*args, **kwargs)
            key = (make, args, *kwargs.items())
            if _is_capturing():
                return cast(R, _reusable[key]) if _reusable and key in _reusable else make(*args, **kwargs)
            constant = cached(*args, **kwargs)
            if _reusable is not None:
                _reusable[key] = constant
            return constant

        @torch.compiler.assume_constant_result
        def get_for_graph(*args: P.args, **kwargs: P.kwargs) -> R:
            return get(*args, **kwargs)  # not traced

        return get

    return decorate


def _can_be_constant(arguments: tuple[object, ...]) -> bool:
    """Return whether a graph that is being compiled can read the result for these arguments as a constant."""
    return _GRAPHS_READ_CONSTANTS and all(map(_is_static, arguments))


def _is_static(argument: object) -> bool:
    """Return whether torch.compile knows the value of an argument, not only its symbol."""
    if isinstance(argument, tuple):
        return all(map(_is_static, argument))
    return not isinstance(argument, int | float) or has_static_value(argument)


def can_cache() -> bool:
    """Return whether tensors made now have values and stay valid, so that they can be cached."""
    return _have_values() and not _is_capturing()


def _have_values() -> bool:
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def _is_capturing() -> bool:
    """Return whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
