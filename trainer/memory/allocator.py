"""How torch cuts the memory of GPUs (no torch)."""

from __future__ import annotations

from collections.abc import MutableMapping

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Ask torch for memory in segments that grow, so that sizes which change leave fewer gaps; a user's choice stays.

    To be called before the first tensor on a GPU.
    """
    if not any(name in environment for name in _SETTINGS):
        environment[_SETTINGS[0]] = "expandable_segments:True"
