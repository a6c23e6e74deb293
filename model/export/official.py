"""Official checkpoints: weights under Detectron2's names, with the metadata that its loader needs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from m2f.model.backbones.timm_names import without_tag
from m2f.model.config import (
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    PmtDecoderConfig,
    SwinBackboneConfig,
    ViTAdapterBackboneConfig,
)
from m2f.model.errors import WeightsError
from m2f.model.export.dinov3 import export_dinov3
from m2f.model.export.eomt import export_eomt
from m2f.model.segmenter import Segmenter
from m2f.model.weights.names import to_official_names
from m2f.model.weights.pmt import pmt_to_authors

_HEAD_VERSION = 2
"""Version of `MaskFormerHead`. Without it, the official loader renames the pixel decoder's weights to unused names, and
trains or evaluates with random tensors (facebookresearch/Mask2Former, issue 95)."""
_PIXEL_FEEDFORWARD = 1024
"""Feed-forward width in the pixel decoder's encoder layers, which the official code does not read from its
configuration."""
_GROUPS = 32
"""Groups of the official GroupNorms. Our GroupNorms have fewer if 32 does not divide the channels."""
_RESNETS = ("resnet50", "resnet101")
_RESNET_OPTIONS = {"drop_path_rate"}
"""Options of a ResNet that do not change any tensor."""


def export_official(model: Segmenter, config: ModelConfig) -> OrderedDict[str, Tensor]:
    """Return weights under the official names, on the CPU. `config` must be that of the model.

    Raises WeightsError with the setting that the official code does not support, even if the tensors would fit.
    """
    require_official(config)
    state = OrderedDict(
        (name, tensor.cpu().contiguous()) for name, tensor in to_official_names(model.state_dict()).items()
    )
    state._metadata = {"": {"version": 1}, "sem_seg_head": {"version": _HEAD_VERSION}}  # type: ignore[attr-defined]
    return state


def write_official(model: Segmenter, config: ModelConfig, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write `export_official` as a Detectron2 checkpoint `{"model": ...}` (.pth) that also contains the notes.

    A model with a ViT-Adapter is written as a DINOv3 checkpoint, and one with the decoder `eomt` or `pmt` as one of
    its authors. These contain tensors only.
    """
    if isinstance(config.backbone, ViTAdapterBackboneConfig):
        torch.save(export_dinov3(model, config), path)
    elif isinstance(config.transformer_decoder, PmtDecoderConfig):
        theirs = pmt_to_authors(model.state_dict(), backbone="backbone" not in config.freeze)
        torch.save(OrderedDict((name, tensor.cpu().contiguous()) for name, tensor in theirs.items()), path)
    elif isinstance(config.transformer_decoder, EomtDecoderConfig):
        torch.save(export_eomt(model), path)
    else:
        torch.save({"model": export_official(model, config), **(notes or {})}, path)


def require_official(config: ModelConfig) -> None:
    """Raise WeightsError with the first setting that the official Mask2Former does not have."""
    plain, queries, pixels = MaskedTransformerDecoderConfig(), config.transformer_decoder, config.pixel_decoder
    if not isinstance(queries, MaskedTransformerDecoderConfig):
        raise _unsupported("transformer_decoder.kind", queries.kind, "masked")
    for name in ("attention", "features", "queries", "cross_attention_first"):
        if getattr(queries, name) != getattr(plain, name):
            raise _unsupported(f"transformer_decoder.{name}", getattr(queries, name), repr(getattr(plain, name)))
    if not isinstance(pixels, MSDeformAttnPixelDecoderConfig):
        raise _unsupported("pixel_decoder.kind", pixels.kind, "ms_deform_attn")
    if pixels.num_points != MSDeformAttnPixelDecoderConfig().num_points:
        raise _unsupported(
            "pixel_decoder.num_points", pixels.num_points, f"{MSDeformAttnPixelDecoderConfig().num_points}"
        )
    if pixels.feedforward_dim != _PIXEL_FEEDFORWARD:
        raise _unsupported("pixel_decoder.feedforward_dim", pixels.feedforward_dim, f"{_PIXEL_FEEDFORWARD}")
    if pixels.conv_dim % _GROUPS:
        raise _unsupported("pixel_decoder.conv_dim", pixels.conv_dim, f"multiples of {_GROUPS}")
    if pixels.num_heads != queries.num_heads:  # the tensors would fit, but the results would differ
        raise _unsupported(
            "pixel_decoder.num_heads", pixels.num_heads, "the value of model.transformer_decoder.num_heads"
        )
    backbone = config.backbone
    if isinstance(backbone, SwinBackboneConfig):
        return
    if isinstance(backbone, ViTAdapterBackboneConfig):
        raise _unsupported("backbone.kind", backbone.kind, "timm and swin")
    if without_tag(backbone.name) not in _RESNETS:
        raise _unsupported("backbone.name", backbone.name, "resnet50, resnet101 and kind swin")
    if backbone.norm not in ("frozen_batch", "sync_batch"):
        raise _unsupported("backbone.norm", backbone.norm, "frozen_batch and sync_batch")
    others = {name: value for name, value in backbone.options.items() if name not in _RESNET_OPTIONS}
    if others:
        raise _unsupported("backbone.options", others, "the standard blocks and channels")


def _unsupported(setting: str, value: object, supported: str) -> WeightsError:
    return WeightsError(
        f"model.{setting} is {value!r}; the official Mask2Former supports only {supported}. Export as torch_export or "
        "onnx, or use the weights with m2f"
    )
