"""Precision of inference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2f.model.structures import Predictions

_CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers whose weights autocast would cast in every forward pass. Subclasses are excluded because they may handle
precision themselves."""


def set_precision(model: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """Set the precision of a model's predictions, for inference only; "fp32" changes nothing.

    In "bf16", matrix products and convolutions run in bfloat16 and give the same bits as a forward pass under autocast.
    Their weights are cast once, in this call. Norm parameters, mask logits, and the coordinates and softmax of
    deformable attention stay in float32.
    """
    if precision == "fp32":
        return
    for module in model.modules():
        if type(module) in _CAST:
            module.to(torch.bfloat16)
    model.forward = _InBfloat16(model.forward)


def deterministic_convolutions() -> AbstractContextManager[Any]:
    """Return a context in which convolutions on GPUs use deterministic algorithms, without TF32.

    Results then do not depend on the GPU of a batch.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class _InBfloat16:
    """A model's forward pass under autocast."""

    def __init__(self, forward: Callable[[Tensor], Predictions]) -> None:
        self._forward = forward

    def __call__(self, images: Tensor) -> Predictions:
        """Return the model's predictions for images [B, 3, H, W]; class logits are float32."""
        # Without the cache, a CUDA graph of the forward pass refers only to tensors that still exist at replay.
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            predictions = self._forward(images)
        return predictions._replace(class_logits=predictions.class_logits.float())
