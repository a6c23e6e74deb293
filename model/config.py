"""Settings of the model, its losses and its post-processing (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from m2f.model.backbones.config import SwinBackboneConfig, TimmBackboneConfig, ViTAdapterBackboneConfig
from m2f.model.eomt.config import EomtDecoderConfig, UpscalePixelDecoderConfig
from m2f.model.errors import ConfigError
from m2f.model.limits import ABOVE_0, BELOW_1, FROM_0, FROM_1, SHARE, Range, Section
from m2f.model.pmt.config import PmtDecoderConfig
from m2f.model.weights.packages import packaged_weights
from m2f.model.weights.sources import HUB, PACKAGE, HubAddress

UP_TO_HALF = Range(0, 0.5)

BackboneConfig = TimmBackboneConfig | SwinBackboneConfig | ViTAdapterBackboneConfig


@dataclass(frozen=True, kw_only=True)
class MSDeformAttnPixelDecoderConfig(Section):
    """Multi-scale deformable attention encoder with one FPN step to stride 4 (paper section 3.2.1)."""

    kind: Literal["ms_deform_attn"] = "ms_deform_attn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the encoder and of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 6
    """Layers of the encoder."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads per layer."""
    num_points: Annotated[int, FROM_1] = 4
    """Sampling points per head and level."""
    feedforward_dim: Annotated[int, FROM_1] = 1024
    """The official code has 1024 although its recipes say 2048."""
    dropout: Annotated[float, BELOW_1] = 0.0
    """Probability with which an activation is set to 0 in training."""
    checkpointing: bool = False
    """Keep only the inputs of the encoder's layers and compute the rest again in the backward pass: with an R50 a
    little more than half the memory per image, for about an eighth more multiply-adds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class FPNPixelDecoderConfig(Section):
    """Feature pyramid network, MaskFormer's default (paper Tables 4e and XIb)."""

    kind: Literal["fpn"] = "fpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class SemanticFPNPixelDecoderConfig(Section):
    """Feature pyramid network with the semantic branch of Panoptic FPN (paper Table 4e)."""

    kind: Literal["semantic_fpn"] = "semantic_fpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the multi-scale features and of the semantic branch."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class BiFPNPixelDecoderConfig(Section):
    """Bidirectional feature pyramid with weighted fusion of EfficientDet (paper Table 4e)."""

    kind: Literal["bifpn"] = "bifpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 3
    """Ways down and up the pyramid, as in the smallest EfficientDet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class FaPNPixelDecoderConfig(Section):
    """Feature-aligned pyramid network with deformable convolutions (paper Tables 4e and V)."""

    kind: Literal["fapn"] = "fapn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    offset_groups: Annotated[int, FROM_1] = 8
    """Groups of channels that are sampled at offsets of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class TransformerFPNPixelDecoderConfig(Section):
    """Transformer encoder over the 1/32 map, then a feature pyramid network: MaskFormer's larger pixel decoder."""

    kind: Literal["transformer_fpn"] = "transformer_fpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the encoder and of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 6
    """Layers of the encoder."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads per layer."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.1
    """Probability with which an activation is set to 0 in training."""
    checkpointing: bool = False
    """Keep only the inputs of the encoder's layers and compute the rest again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


MultiScalePixelDecoderConfig = (
    MSDeformAttnPixelDecoderConfig
    | FPNPixelDecoderConfig
    | SemanticFPNPixelDecoderConfig
    | BiFPNPixelDecoderConfig
    | FaPNPixelDecoderConfig
    | TransformerFPNPixelDecoderConfig
)
PixelDecoderConfig = MultiScalePixelDecoderConfig | UpscalePixelDecoderConfig


def _check_pixel_decoder(config: PixelDecoderConfig) -> None:
    match config:
        case MSDeformAttnPixelDecoderConfig() | TransformerFPNPixelDecoderConfig():
            divisors, names = (4, config.num_heads), f"4 and num_heads ({config.num_heads})"
        case FaPNPixelDecoderConfig():
            divisors, names = (config.offset_groups,), f"offset_groups ({config.offset_groups})"
        case _:
            return
    if any(config.conv_dim % divisor for divisor in divisors):
        raise ConfigError(f"model.pixel_decoder.conv_dim is {config.conv_dim}; {names} must divide it")


@dataclass(frozen=True, kw_only=True)
class MaskedTransformerDecoderConfig(Section):
    """Mask2Former's transformer decoder (paper section 3.2), with every variant that the paper measures."""

    kind: Literal["masked"] = "masked"
    num_queries: Annotated[int, FROM_1] = 100
    """Segments that the model can predict in one image."""
    num_layers: Annotated[int, FROM_1] = 9
    """Layers after the learnable queries; the official recipes write 10 for these 9."""
    hidden_dim: Annotated[int, FROM_1] = 256
    """Channels of a query."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads per layer."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.0
    """Probability with which an activation is set to 0 in training."""
    attention: Literal["masked", "cross", "smca", "mask_pooling"] = "masked"
    """How queries look at the image (Table 4c): inside their predicted masks; everywhere; everywhere with a Gaussian
    prior (SMCA); as the mean over their predicted masks, without attention (K-Net's pooling)."""
    features: Literal["multi_scale", "naive_multi_scale", "stride_8", "stride_16", "stride_32"] = "multi_scale"
    """What the layers look at (Table 4d): 1/32, 1/16 and 1/8 in turn; all three at once in every layer; one scale."""
    queries: Literal["supervised", "learnable", "zero"] = "supervised"
    """Initial queries (Table Xb): learnt, and supervised before the first layer; learnt; zero as in DETR. Without the
    supervision there is one prediction fewer. Their positional embeddings are always learnt."""
    cross_attention_first: bool = True
    """Look at the image before attending to each other (Table 4b)."""
    pre_norm: bool = False
    """LayerNorm before each block instead of after its residual."""

    @property
    def takes_pilots(self) -> bool:
        """Whether a query can be told where to look."""
        return self.attention in ("masked", "mask_pooling")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self)
        if self.attention == "mask_pooling" and self.pre_norm:
            raise ConfigError(
                "model.transformer_decoder.pre_norm is true, but mask_pooling does not read the queries that it would "
                "normalise; set pre_norm to false or choose another attention"
            )


@dataclass(frozen=True, kw_only=True)
class StandardTransformerDecoderConfig(Section):
    """MaskFormer's transformer decoder, that of DETR (Cheng et al., NeurIPS 2021; Table XIb of the Mask2Former paper).

    It looks at one map of stride 32: the encoder's with the pixel decoder `transformer_fpn`, else the backbone's.
    """

    kind: Literal["standard"] = "standard"
    num_queries: Annotated[int, FROM_1] = 100
    """Segments that the model can predict in one image."""
    num_layers: Annotated[int, FROM_1] = 6
    """Layers of the decoder."""
    hidden_dim: Annotated[int, FROM_1] = 256
    """Channels of a query."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads per layer."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.1
    """Probability with which an activation is set to 0 in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self)


_OfTokens = EomtDecoderConfig | PmtDecoderConfig
TransformerDecoderConfig = MaskedTransformerDecoderConfig | StandardTransformerDecoderConfig | _OfTokens


def _check_decoder(config: MaskedTransformerDecoderConfig | StandardTransformerDecoderConfig) -> None:
    if config.hidden_dim % config.num_heads or config.hidden_dim % 4:
        raise ConfigError(
            f"model.transformer_decoder.hidden_dim is {config.hidden_dim}; "
            f"4 and num_heads ({config.num_heads}) must divide it"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Losses and matching costs, their weights (the paper uses equal numbers for both) and point sampling."""

    mask_loss: Literal["bce", "focal"] = "bce"
    """Loss of a pixel: binary cross-entropy, or the focal loss of MaskFormer (alpha 0.25, gamma 2)."""
    matching: Literal["points", "masks"] = "points"
    """Where the cost of a pair is computed (Table 5): at random points, or on every pixel of the stride-4 map."""
    supervision: Literal["points", "masks"] = "points"
    """Where the loss is computed (Table 5): at importance-sampled points, or on every pixel of the input, to which
    the predicted masks are resized as in MaskFormer."""
    class_weight: Annotated[float, FROM_0] = 2.0
    """Weight of the cross-entropy of classes, in the loss and in the matching cost."""
    mask_weight: Annotated[float, FROM_0] = 5.0
    """Weight of the loss of pixels, in the loss and in the matching cost."""
    dice_weight: Annotated[float, FROM_0] = 5.0
    """Weight of the dice loss of masks, in the loss and in the matching cost."""
    no_object_weight: Annotated[float, FROM_0] = 0.1
    """Class weight of "no object" in the cross-entropy."""
    num_points: Annotated[int, FROM_1] = 12544
    """Points per mask in the matcher and in the losses (112 x 112)."""
    oversample_ratio: Annotated[float, FROM_1] = 3.0
    """Random candidates per point, of which the losses keep the most uncertain."""
    importance_sample_ratio: Annotated[float, SHARE] = 0.75
    """Share of the points of the losses that are chosen by uncertainty; the others are uniform."""
    matching_box_share: Annotated[float, UP_TO_HALF] = 0.0
    """Share of the matcher's points that are dealt to boxes around the image's targets, so that small targets get some;
    weights keep what the costs estimate. 0.5 for small objects; 0 as published."""
    supervision_box_share: Annotated[float, UP_TO_HALF] = 0.0
    """Share of the points of a matched mask that are drawn in a box around its target; weights keep what the losses
    estimate. 0.5 for small objects; 0 as published."""
    class_norm: Literal["global", "per_rank"] = "global"
    """Denominator of the class loss: over the whole global batch, or per rank and micro-batch as the official code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for use in ("matching", "supervision"):
            share = getattr(self, f"{use}_box_share")
            if share > 0 and getattr(self, use) == "masks":
                raise ConfigError(
                    f"model.loss.{use}_box_share is {share}, but model.loss.{use} is masks, which takes every pixel; "
                    f"set model.loss.{use}=points, or leave the share out"
                )


@dataclass(frozen=True, kw_only=True)
class PilotConfig(Section):
    """Mask-piloted training (Zhang et al., MP-Former, CVPR 2023): further queries of known targets, in training alone.

    A pilot starts from the class of its target, and looks at the image inside the true mask. It needs no matching.
    """

    max_targets: Annotated[int, FROM_0] = 0
    """Targets of an image that have a pilot. Where there are more, a hash of the image's position chooses. 100 holds
    nearly all; 0, without pilots, as published for Mask2Former."""
    label_noise: Annotated[float, SHARE] = 0.2
    """Probability that a pilot starts from a class drawn at random."""
    mask_noise: Annotated[float, SHARE] = 0.0
    """Cells of the attention mask that change sides in every layer, most of them outside the target: their expected
    number as a share of the target's cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_noise", "mask_noise"):
            if not self.max_targets and getattr(self, name) != getattr(PilotConfig, name):
                raise ConfigError(
                    f"model.pilots.{name} is {getattr(self, name)}, but model.pilots.max_targets is 0: there are no "
                    f"pilots; set model.pilots.max_targets=100, or leave {name} out"
                )


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig(Section):
    """Thresholds of the official inference procedure."""

    object_threshold: Annotated[float, SHARE] = 0.8
    """Panoptic: queries whose best class scores at most this are dropped."""
    overlap_threshold: Annotated[float, SHARE] = 0.8
    """Panoptic: a segment that keeps less than this share of its mask is dropped."""
    max_instances: Annotated[int, FROM_1] = 100
    """Instance: number of (query, class) pairs kept per image."""
    semantic_resize: Literal["masks", "class_scores"] = "masks"
    """Semantic: what is resized to the original image, the masks before their sum over queries, or the sum. The
    official code resizes the sum in models for semantic segmentation alone, else the masks."""


ModelPart = Literal["backbone", "pixel_decoder", "transformer_decoder"]
"""Names of the parts in the model, too."""
FreezablePart = Literal[ModelPart, "backbone.vit"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The whole model. `num_classes` comes from the category table of the data and is not written in recipes."""

    backbone: BackboneConfig = field(default_factory=TimmBackboneConfig)
    """The network that turns an image into features."""
    pixel_decoder: PixelDecoderConfig = field(default_factory=MSDeformAttnPixelDecoderConfig)
    """What turns the features of the backbone into features of several scales and embeddings of pixels."""
    transformer_decoder: TransformerDecoderConfig = field(default_factory=MaskedTransformerDecoderConfig)
    """What turns queries and features into classes and masks."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses, their weights and the matching of predictions with targets."""
    pilots: PilotConfig = field(default_factory=PilotConfig)
    """Further queries in training whose targets are known."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """How predictions become segments."""
    num_classes: Annotated[int | None, FROM_1] = None
    """Number of classes without "no object"; None until the category table is known."""
    weights: str | None = None
    """Weights to start from: path or URL of a file of ours, an official checkpoint, a Hugging Face folder or published
    weights of the backbone alone; or `hub:OWNER/NAME[@REVISION]`, a model of the Hugging Face hub. None starts from the
    initialisation."""
    weights_are_deltas: bool = False
    """The backbone in `weights` is what to add to that of `backbone.pretrained` or `backbone.weights`: the authors of
    EoMT publish models on DINOv3 so, whose licence asks for it."""
    freeze: tuple[FreezablePart, ...] = ()
    """Parts that training leaves exactly as they are, with the statistics of their norms: no gradients, no state of the
    optimizer, no backward pass where nothing before them is trained. `[backbone]` for small data sets; `[backbone.vit]`
    is the transformer inside `backbone.kind` vit_adapter."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of red, green and blue that is subtracted, of 0 to 255; the default is ImageNet's."""
    pixel_std: Annotated[tuple[float, float, float], ABOVE_0] = (58.395, 57.12, 57.375)
    """Standard deviation of red, green and blue that is divided by; the default is ImageNet's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights or "").startswith(HUB):
            HubAddress.parse(self.weights or "")
        if (self.backbone.weights or "").startswith(HUB):
            raise ConfigError(
                f"model.backbone.weights is {self.backbone.weights}, a model of the hub, which only model.weights may "
                "be; set that instead"
            )
        self._check_package()
        self._check_parts()
        self._check_pilots()
        if "://" in (self.backbone.weights or ""):
            raise ConfigError(
                f"model.backbone.weights is {self.backbone.weights}, a URL, which only model.weights may be; "
                "set that instead, it takes weights of a backbone alone too"
            )

    def _check_parts(self) -> None:
        if "backbone.vit" in self.freeze and not isinstance(self.backbone, ViTAdapterBackboneConfig):
            raise ConfigError(
                f"model.freeze has backbone.vit, which backbone.kind {self.backbone.kind} lacks; write [backbone]"
            )
        has_base = self.backbone.weights is not None or self.backbone.pretrained is True
        if self.weights_are_deltas and (self.weights is None or not has_base):
            raise ConfigError(
                f"model.weights_are_deltas is true, with model.weights {self.weights}; it needs them, and what they "
                "are added to: set model.backbone.pretrained to true, or model.backbone.weights to a file"
            )
        kind, takes_tokens = self.transformer_decoder.kind, ("eomt", "pmt")
        found = {
            "transformer_decoder.kind": (kind, kind if kind in takes_tokens else " or ".join(takes_tokens)),
            "pixel_decoder.kind": (self.pixel_decoder.kind, "upscale"),
            "backbone.features": (getattr(self.backbone, "features", "maps"), "tokens"),
        }
        belong = [value == wanted for value, wanted in found.values()]
        if any(belong) and not all(belong):
            has = ", ".join(f"model.{name} {value}" for name, (value, _) in found.items())
            needs = ", ".join(f"{name} {wanted}" for name, (_, wanted) in found.items())
            raise ConfigError(f"{has} do not fit together; set all of {needs}, or none of them")

    def _check_pilots(self) -> None:
        decoder = self.transformer_decoder
        if self.pilots.max_targets and not getattr(decoder, "takes_pilots", False):
            attention = f" with attention {found}" if (found := getattr(decoder, "attention", None)) else ""
            raise ConfigError(
                f"model.pilots.max_targets is {self.pilots.max_targets}, but model.transformer_decoder is "
                f"{decoder.kind}{attention}, which cannot be told where to look; set max_targets=0, or take the "
                "decoder masked with attention masked or mask_pooling"
            )

    def _check_package(self) -> None:
        if not (self.backbone.weights or "").startswith(PACKAGE):
            return
        known, name = packaged_weights(self.backbone.weights or ""), getattr(self.backbone, "name", None)
        if name != known.model:
            raise ConfigError(
                f"model.backbone.weights is {self.backbone.weights}, which belongs to {known.model}; set "
                f"model.backbone to {{kind: timm, name: {known.model}, weights: {self.backbone.weights}}}"
            )
