"""Build backbones, which turn images into feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from m2f.model.backbones.model_weights import is_model, load_from_model
from m2f.model.backbones.plain_vit import PlainVit
from m2f.model.backbones.swin import SwinTransformer
from m2f.model.backbones.swin_weights import load_swin_weights
from m2f.model.backbones.timm_backbone import TimmBackbone
from m2f.model.backbones.vit_adapter import ViTAdapter
from m2f.model.config import BackboneConfig, SwinBackboneConfig, TimmBackboneConfig, ViTAdapterBackboneConfig

Backbone = TimmBackbone | SwinTransformer | PlainVit | ViTAdapter
"""A module that maps images [B, 3, H, W] to a tuple of four maps [B, C_i, H / s, W / s], rounded up. Its `channels` are
the C_i. A PlainVit returns tokens [B, T, C] instead, and its `channels` are (C,)."""


def build_backbone(config: BackboneConfig, *, pretrained: bool = True) -> Backbone:
    """Build the backbone of a recipe. With `pretrained=False` its weights are neither downloaded nor read.

    Raises ConfigError for an unknown name, unusable options or weights, or a model without suitable features.
    """
    if not pretrained or config.weights is None or not is_model(config.weights):
        return _build(config, pretrained=pretrained)
    backbone = _build(config, pretrained=False)
    load_from_model(backbone, config.weights)
    return backbone


def _build(config: BackboneConfig, *, pretrained: bool) -> Backbone:
    match config:
        case TimmBackboneConfig(features="tokens"):
            return PlainVit(config, pretrained=pretrained)
        case TimmBackboneConfig():
            return TimmBackbone(config, pretrained=pretrained)
        case ViTAdapterBackboneConfig():
            return ViTAdapter(config, pretrained=pretrained)
        case SwinBackboneConfig():
            backbone = SwinTransformer(config)
            if pretrained:
                load_swin_weights(backbone, config)
            return backbone
