"""Mask2Former of `transformers` for a recipe, with the recipe's backbone, and conversion of weight names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.modeling_outputs import BackboneOutput

from benchmarks.synthetic_batches import dense_masks
from m2f.model.config import ModelConfig, TimmBackboneConfig
from m2f.model.export.hugging_face import write_hugging_face_config
from m2f.model.mask2former import Mask2Former
from m2f.model.structures import Targets
from m2f.model.weights.names import to_hugging_face_names, to_own_names

_BACKBONE = "backbone."
_TRANSFORMERS_BACKBONE = "model.pixel_level_module.encoder.backbone."
_EXPANSION = 4  # channel expansion of a bottleneck


class _Encoder(nn.Module):
    """Adapter that puts our backbone in place of theirs. The attribute name `backbone` selects its learning rate."""

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = list(channels)

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return feature maps at strides 4, 8, 16 and 32 of images [B, 3, H, W]."""
        return BackboneOutput(feature_maps=self.backbone(pixel_values))


def transformers_twin(ours: Mask2Former, config: ModelConfig) -> Mask2FormerForUniversalSegmentation:
    """Return their network and criterion with the weights of ours and a copy of our backbone.

    Raises WeightsError if `transformers` does not have the decoders of the recipe.
    """
    channels: tuple[int, ...] = ours.backbone.channels  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You'd better set embed_dim")  # concerns a CUDA kernel only
        theirs = Mask2FormerForUniversalSegmentation(_transformers_config(config, channels))
    theirs.model.pixel_level_module.encoder = _Encoder(deepcopy(ours.backbone), channels)
    state = to_transformers_names(ours.state_dict())
    theirs.load_state_dict({"criterion.empty_weight": theirs.criterion.empty_weight, **state})
    return theirs


def transformers_loss(theirs: Mask2FormerForUniversalSegmentation, pixels: Tensor, targets: Targets) -> Tensor:
    """Return the total loss [] of a micro-batch; `pixels` [B, 3, H, W] are normalised by our model."""
    labels = [image_labels[valid] for image_labels, valid in zip(targets.labels, targets.valid, strict=True)]
    return theirs(pixel_values=pixels, mask_labels=dense_masks(targets), class_labels=labels).loss.view(())


def to_transformers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of our model to the names of `transformers_twin`."""
    heads, backbone = _split_backbone(weights, _BACKBONE, _TRANSFORMERS_BACKBONE)
    return to_hugging_face_names(heads) | backbone


def to_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of `transformers_twin` to the names of our model."""
    heads, backbone = _split_backbone(weights, _TRANSFORMERS_BACKBONE, _BACKBONE)
    return to_own_names(heads, "hugging_face") | backbone


def _split_backbone(weights: Mapping[str, Tensor], old: str, new: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the heads, and those of the backbone with the prefix `new` instead of `old`."""
    heads = {name: tensor for name, tensor in weights.items() if not name.startswith(old)}
    backbone = {new + name.removeprefix(old): weights[name] for name in weights.keys() - heads.keys()}
    return heads, backbone


def _transformers_config(config: ModelConfig, channels: tuple[int, ...]) -> Mask2FormerConfig:
    """Return their configuration, with a small ResNet of the same channels as the backbone.

    The ResNet only determines the input channels of their pixel decoder.
    """
    options = {"layers": (1, 1, 1, 1), "channels": tuple(width // _EXPANSION for width in channels)}
    stand_in = replace(config, backbone=TimmBackboneConfig(name="resnet50", options=options))
    labels = [str(label) for label in range(config.num_classes or 0)]
    with TemporaryDirectory() as folder:
        write_hugging_face_config(Path(folder), stand_in, labels, {}, shortest_edge=1, max_size=1)
        return Mask2FormerConfig.from_pretrained(folder)
