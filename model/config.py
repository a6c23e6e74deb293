"""Settings of the model, its losses and its post-processing (standard library only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.errors import ConfigError, require_at_least


@dataclass(frozen=True, kw_only=True)
class TimmBackboneConfig:
    """Any convolutional timm model that supports `features_only`."""

    kind: Literal["timm"] = "timm"
    name: str = "resnet50"
    """Name of the model in timm, for example `resnet50` or `convnext_tiny`."""
    pretrained: bool = False
    """Fetch timm's published weights of this name. Needs a network; use `weights` where there is none."""
    weights: str | None = None
    """Path of a safetensors or torch file with weights of the backbone alone. Read without executing pickles."""
    norm: Literal["frozen_batch", "group", "native"] = "frozen_batch"
    """`frozen_batch` as in the paper, `group` to train from random weights, `native` to keep what timm builds."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model, for example `{channels: [32, 64, 128, 256]}`."""


BackboneConfig = TimmBackboneConfig


@dataclass(frozen=True, kw_only=True)
class MSDeformAttnPixelDecoderConfig:
    """Multi-scale deformable attention encoder with one FPN step to stride 4 (paper section 3.2.1)."""

    kind: Literal["ms_deform_attn"] = "ms_deform_attn"
    conv_dim: int = 256
    """Channels of the encoder and of the multi-scale features."""
    mask_dim: int = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    """Sampling points per head and level."""
    feedforward_dim: int = 1024
    """The official code has 1024 although its recipes say 2048."""
    dropout: float = 0.0


PixelDecoderConfig = MSDeformAttnPixelDecoderConfig


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig:
    """Masked-attention transformer decoder (paper section 3.2)."""

    num_queries: int = 100
    num_layers: int = 9
    """Layers after the supervised learnable queries; the official recipes write 10 for these 9."""
    hidden_dim: int = 256
    num_heads: int = 8
    feedforward_dim: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        where = "model__transformer_decoder__"
        require_at_least(
            1, **{where + name: getattr(self, name) for name in ("num_queries", "num_layers", "num_heads")}
        )
        if self.hidden_dim % self.num_heads:
            raise ConfigError(
                f"model.transformer_decoder.hidden_dim is {self.hidden_dim}, "
                f"which num_heads ({self.num_heads}) does not divide"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of losses and matching costs (the paper uses equal numbers for both) and point sampling."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Class weight of "no object" in the cross-entropy."""
    num_points: int = 12544
    """Points per mask in the matcher and in the losses (112 x 112)."""
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    class_norm: Literal["global", "per_rank"] = "global"
    """Denominator of the class loss: over the whole global batch, or per rank and micro-batch as the official code."""


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """Thresholds of the official inference procedure."""

    object_threshold: float = 0.8
    """Panoptic: queries whose best class scores at most this are dropped."""
    overlap_threshold: float = 0.8
    """Panoptic: a segment that keeps less than this share of its mask is dropped."""
    max_instances: int = 100
    """Instance: number of (query, class) pairs kept per image."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `num_classes` comes from the category table of the data and is not written in recipes."""

    backbone: BackboneConfig = field(default_factory=TimmBackboneConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=MSDeformAttnPixelDecoderConfig)
    transformer_decoder: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    num_classes: int | None = None
    """Number of classes without "no object"; None until the category table is known."""
    weights: str | None = None
    """Path or URL of weights to start from (a whole model); None starts from the initialisation."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
