"""Configure torch's GPU memory allocator. Does not import torch."""

from __future__ import annotations

from collections.abc import MutableMapping

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def enable_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Make torch allocate memory in expandable segments, so that changing sizes leave fewer gaps.

    A setting by the user is kept. Call this before creating the first tensor on a GPU.
    """
    if not any(name in environment for name in _SETTINGS):
        environment[_SETTINGS[0]] = "expandable_segments:True"
