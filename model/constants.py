"""Tensors that depend on sizes alone, made once: each would cost some ten launches in every forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")


def kept(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep the last `size` results of a function of hashable arguments, which nobody may write to.

    Nothing is kept of what a graph or a tensor without values would be made from, nor read there: the function runs as
    it is where it is compiled or exported, under a dispatch mode, and while a CUDA graph is recorded.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=size)
        def make_once(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.inference_mode(False):  # what inference makes, training could not keep for its backward pass
                return make(*args, **kwargs)

        @functools.wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> R:
            return make_once(*args, **kwargs) if may_keep() else make(*args, **kwargs)

        return get

    return decorate


def may_keep() -> bool:
    """Whether tensors made now have values and stay valid."""
    if torch.compiler.is_compiling():
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
