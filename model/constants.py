"""Cache for tensors that depend only on sizes. Building them would take about ten kernel launches per forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")


def cache_constants(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the last `size` results of a function with hashable arguments. Callers must not write to the results.

    The cache is bypassed during compilation and export, under a dispatch mode, and while a CUDA graph is recorded. In
    these cases tensors may belong to a graph or have no values, so the function runs uncached.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=size)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.inference_mode(False):  # autograd cannot save inference tensors for a backward pass
                return make(*args, **kwargs)

        @functools.wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> R:
            return cached(*args, **kwargs) if can_cache() else make(*args, **kwargs)

        return get

    return decorate


def can_cache() -> bool:
    """Return whether tensors made now have values and stay valid, so that they can be cached."""
    if torch.compiler.is_compiling():
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
