"""Compiling the model's parts, each into one graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

REGIONS = ("backbone", "pixel_decoder", "transformer_decoder")


def compile_regions(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let backbone and decoders of a Mask2Former compile themselves at their first input of each shape.

    Images of one size make one graph per region, whatever they show: targets are seen by the criterion alone, which is
    not compiled. Weights keep their names, and DeepSpeed its hooks.
    """
    for name in REGIONS:
        model.get_submodule(name).compile(backend=backend, dynamic=False)
