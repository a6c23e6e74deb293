"""What a forward pass gives for one image, as the post-processing takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from m2f.model.inference.mask_resize import ImageGeometry


class ImageOutput(NamedTuple):
    """What one layer of the model predicts for one image: the first arguments of the post-processing."""

    class_logits: Tensor
    """[Q, K + 1]"""
    mask_embeddings: Tensor
    """[Q, C]"""
    mask_features: Tensor
    """[C, h, w]"""
    geometry: ImageGeometry
