"""Inference in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from m2f.model.structures import Predictions

_CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers whose weights autocast would cast at every forward; not what inherits from them, which may know better."""


def set_precision(model: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """From now on a model predicts in this precision; "fp32" changes nothing. For inference only.

    In "bf16" products and convolutions are done in bfloat16, with the bits of a forward in `bf16_autocast`. Their
    weights are cast here, once and for all. Norms, coordinates and softmax stay float32, and so do mask logits.
    """
    if precision == "fp32":
        return
    for module in model.modules():
        if type(module) in _CAST:
            module.to(torch.bfloat16)
    model.forward = _InBfloat16(model.forward)


class _InBfloat16:
    """A model's forward under autocast."""

    def __init__(self, forward: Callable[[Tensor], Predictions]) -> None:
        self._forward = forward

    def __call__(self, images: Tensor) -> Predictions:
        """As the model's forward, from images [B, 3, H, W]; class logits are float32."""
        # Without the cache, a CUDA graph of the forward refers to no tensor that is gone when it is replayed.
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            predictions = self._forward(images)
        return predictions._replace(class_logits=predictions.class_logits.float())
