"""Output of a forward pass for one image, in the form that the post-processing takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from m2f.model.inference.mask_resize import ImageGeometry


class ImageOutput(NamedTuple):
    """Predictions of one layer for one image: the first arguments of the post-processing."""

    class_logits: Tensor
    """[Q, K + 1] float, with "no object" last."""
    mask_embeddings: Tensor
    """[Q, C] float."""
    mask_features: Tensor
    """[C, h, w] float."""
    geometry: ImageGeometry
