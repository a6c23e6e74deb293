"""Settings of the model, its losses and its post-processing (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

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
    """Multi-scale deformable attention encoder with one FPN step to stride 4 (paper section 4.1)."""

    kind: Literal["ms_deform_attn"] = "ms_deform_attn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the encoder and of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 6
    """Number of encoder layers."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads in every layer; must divide `conv_dim`."""
    num_points: Annotated[int, FROM_1] = 4
    """Sampling points per head and level."""
    feedforward_dim: Annotated[int, FROM_1] = 1024
    """Channels inside the feed-forward block of a layer. The official code uses 1024 although its recipes say 2048."""
    dropout: Annotated[float, BELOW_1] = 0.0
    """Probability that an activation is set to 0 in training."""
    checkpointing: bool = False
    """Keep only the inputs of the encoder's layers and recompute the rest in the backward pass. With an R50 this uses a
    little more than half the memory per image and about an eighth more multiply-adds."""

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
    """Bidirectional feature pyramid with the weighted fusion of EfficientDet (paper Table 4e)."""

    kind: Literal["bifpn"] = "bifpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 3
    """BiFPN layers. Each makes one top-down and one bottom-up pass; the smallest EfficientDet has 3."""

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
    """Groups of channels, each sampled at its own offsets; must divide `conv_dim`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pixel_decoder(self)


@dataclass(frozen=True, kw_only=True)
class TransformerFPNPixelDecoderConfig(Section):
    """Transformer encoder on the 1/32 map, followed by a feature pyramid network: MaskFormer's larger pixel decoder."""

    kind: Literal["transformer_fpn"] = "transformer_fpn"
    conv_dim: Annotated[int, FROM_1] = 256
    """Channels of the encoder and of the multi-scale features."""
    mask_dim: Annotated[int, FROM_1] = 256
    """Channels of the per-pixel embeddings at stride 4."""
    num_layers: Annotated[int, FROM_1] = 6
    """Number of encoder layers."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads in every layer; must divide `conv_dim`."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.1
    """Probability that an activation is set to 0 in training."""
    checkpointing: bool = False
    """Keep only the inputs of the encoder's layers and recompute the rest in the backward pass."""

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
        raise ConfigError(f"model.pixel_decoder.conv_dim is {config.conv_dim}; it must be a multiple of {names}")


@dataclass(frozen=True, kw_only=True)
class MaskedTransformerDecoderConfig(Section):
    """Mask2Former's transformer decoder (paper section 3.2) with every variant that the paper measures."""

    kind: Literal["masked"] = "masked"
    num_queries: Annotated[int, FROM_1] = 100
    """Number of queries: the maximum number of segments per image."""
    num_layers: Annotated[int, FROM_1] = 9
    """Decoder layers. The official recipes write 10 for these 9 because they also count the initial queries."""
    hidden_dim: Annotated[int, FROM_1] = 256
    """Channels of a query; 4 and `num_heads` must divide it."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads in every layer."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.0
    """Probability that an activation is set to 0 in training."""
    attention: Literal["masked", "cross", "smca", "mask_pooling"] = "masked"
    """How queries read the image (Table 4c). `masked`: attention inside the predicted masks. `cross`: attention to all
    pixels. `smca`: attention to all pixels with a Gaussian prior. `mask_pooling`: mean over the predicted mask without
    attention, as in K-Net."""
    features: Literal["multi_scale", "naive_multi_scale", "stride_8", "stride_16", "stride_32"] = "multi_scale"
    """Feature levels that the layers read (Table 4d). `multi_scale`: 1/32, 1/16 and 1/8 in turn. `naive_multi_scale`:
    all three in every layer. `stride_8`, `stride_16` and `stride_32`: this one level only."""
    queries: Literal["supervised", "learnable", "zero"] = "supervised"
    """Initial queries (Table Xb). `supervised`: learned, with a loss before the first layer. `learnable`: learned,
    without that loss. `zero`: zeros, as in DETR. Without the loss there is one prediction fewer. Positional embeddings
    are always learned."""
    cross_attention_first: bool = True
    """Whether cross-attention to the image comes before self-attention among the queries (Table 4b)."""
    pre_norm: bool = False
    """Apply LayerNorm before each block instead of after its residual."""

    @property
    def supports_pilots(self) -> bool:
        """Whether the decoder accepts a given attention mask for each query, as pilots need."""
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
    """MaskFormer's transformer decoder, which is DETR's.

    Source: Cheng et al., NeurIPS 2021; Table XIb of the Mask2Former paper. It attends to one map of stride 32: the
    encoder's with the pixel decoder `transformer_fpn`, otherwise the backbone's.
    """

    kind: Literal["standard"] = "standard"
    num_queries: Annotated[int, FROM_1] = 100
    """Number of queries: the maximum number of segments per image."""
    num_layers: Annotated[int, FROM_1] = 6
    """Number of decoder layers."""
    hidden_dim: Annotated[int, FROM_1] = 256
    """Channels of a query; 4 and `num_heads` must divide it."""
    num_heads: Annotated[int, FROM_1] = 8
    """Attention heads in every layer."""
    feedforward_dim: Annotated[int, FROM_1] = 2048
    """Channels inside the feed-forward block of a layer."""
    dropout: Annotated[float, BELOW_1] = 0.1
    """Probability that an activation is set to 0 in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self)


_TokenDecoderConfig = EomtDecoderConfig | PmtDecoderConfig
TransformerDecoderConfig = MaskedTransformerDecoderConfig | StandardTransformerDecoderConfig | _TokenDecoderConfig


def _check_decoder(config: MaskedTransformerDecoderConfig | StandardTransformerDecoderConfig) -> None:
    if config.hidden_dim % config.num_heads or config.hidden_dim % 4:
        raise ConfigError(
            f"model.transformer_decoder.hidden_dim is {config.hidden_dim}; "
            f"it must be a multiple of 4 and num_heads ({config.num_heads})"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Losses, matching costs, their weights and point sampling.

    As in the paper, losses and costs share their weights.
    """

    mask_loss: Literal["bce", "focal"] = "bce"
    """Pixel loss: binary cross-entropy, or MaskFormer's focal loss (alpha 0.25, gamma 2)."""
    matching: Literal["points", "masks"] = "points"
    """Where the matching cost of a pair is computed (Table 5): at random points, or at every pixel of the stride-4 map.
    """
    supervision: Literal["points", "masks"] = "points"
    """Where the loss is computed (Table 5): at importance-sampled points, or at every pixel of the input. In the second
    case the predicted masks are resized to the input, as in MaskFormer."""
    class_weight: Annotated[float, FROM_0] = 2.0
    """Weight of the classification term in the loss (cross-entropy) and in the matching cost (negative probability)."""
    mask_weight: Annotated[float, FROM_0] = 5.0
    """Weight of the pixel loss, in the loss and in the matching cost."""
    dice_weight: Annotated[float, FROM_0] = 5.0
    """Weight of the dice loss, in the loss and in the matching cost."""
    no_object_weight: Annotated[float, FROM_0] = 0.1
    """Class weight of "no object" in the cross-entropy."""
    num_points: Annotated[int, FROM_1] = 12544
    """Points per mask, in the matching cost and in the losses. The default is 112 x 112."""
    oversample_ratio: Annotated[float, FROM_1] = 3.0
    """Random candidate points per loss point. The losses keep the most uncertain candidates."""
    importance_sample_ratio: Annotated[float, SHARE] = 0.75
    """Share of the loss points that are selected by uncertainty. The others are uniform."""
    matching_box_share: Annotated[float, UP_TO_HALF] = 0.0
    """Share of the matching points that are moved into boxes around the image's targets, so that small targets are
    sampled. Weights keep the expected cost unchanged. Use 0.5 for small objects; the published value is 0."""
    supervision_box_share: Annotated[float, UP_TO_HALF] = 0.0
    """Share of a matched mask's loss points that are drawn in a box around its target. Weights keep the expected loss
    unchanged. Use 0.5 for small objects; the published value is 0."""
    class_norm: Literal["global", "per_rank"] = "global"
    """Denominator of the class loss: `global` sums over the whole global batch; `per_rank` sums over each rank's
    micro-batch, as the official code does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for use in ("matching", "supervision"):
            share = getattr(self, f"{use}_box_share")
            if share > 0 and getattr(self, use) == "masks":
                raise ConfigError(
                    f"model.loss.{use}_box_share is {share}, but model.loss.{use} is masks, which uses every pixel; "
                    f"set model.loss.{use}=points, or omit the share"
                )


@dataclass(frozen=True, kw_only=True)
class PilotConfig(Section):
    """Mask-piloted training (Zhang et al., MP-Former, CVPR 2023): extra queries with known targets, in training only.

    A pilot starts from the class of its target and attends to the image inside the true mask. It needs no matching.
    """

    max_targets: Annotated[int, FROM_0] = 0
    """Maximum number of targets per image that get a pilot. If an image has more, a hash of its position selects them.
    100 covers nearly all images. 0 disables pilots, as published for Mask2Former."""
    label_noise: Annotated[float, SHARE] = 0.2
    """Probability that a pilot starts from a random class instead of its target's class."""
    mask_noise: Annotated[float, SHARE] = 0.0
    """Expected number of attention-mask cells that flip in every layer, as a share of the target's cells. Most flipped
    cells lie outside the target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_noise", "mask_noise"):
            if not self.max_targets and getattr(self, name) != getattr(PilotConfig, name):
                raise ConfigError(
                    f"model.pilots.{name} is {getattr(self, name)}, but model.pilots.max_targets is 0, which "
                    f"disables pilots; set model.pilots.max_targets=100, or omit {name}"
                )


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig(Section):
    """Thresholds of the official inference procedure."""

    object_threshold: Annotated[float, SHARE] = 0.8
    """Panoptic: drop queries whose best class score is at most this."""
    overlap_threshold: Annotated[float, SHARE] = 0.8
    """Panoptic: drop a segment that keeps less than this share of its mask."""
    max_instances: Annotated[int, FROM_1] = 100
    """Instance: number of (query, class) pairs kept per image."""
    semantic_resize: Literal["masks", "class_scores"] = "masks"
    """Semantic: tensor that is resized to the original image, the masks before the sum over queries or the summed class
    scores. The official code resizes class scores in models for semantic segmentation only, and masks in all others."""


ModelPart = Literal["backbone", "pixel_decoder", "transformer_decoder"]
"""Parts of the model; also the names of its submodules."""
FreezablePart = Literal[ModelPart, "backbone.vit"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The whole model. `num_classes` comes from the category table of the data; recipes do not set it."""

    backbone: BackboneConfig = field(default_factory=TimmBackboneConfig)
    """The network that turns an image into features."""
    pixel_decoder: PixelDecoderConfig = field(default_factory=MSDeformAttnPixelDecoderConfig)
    """The network that turns the backbone's features into multi-scale features and per-pixel embeddings."""
    transformer_decoder: TransformerDecoderConfig = field(default_factory=MaskedTransformerDecoderConfig)
    """The network that turns queries and features into classes and masks."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses, their weights, and the matching of predictions to targets."""
    pilots: PilotConfig = field(default_factory=PilotConfig)
    """Extra training queries with known targets."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """How predictions are converted to segments."""
    num_classes: Annotated[int | None, FROM_1] = None
    """Number of classes without "no object". None until the category table of the data is read."""
    weights: str | None = None
    """Initial weights: a path, a URL, or `hub:OWNER/NAME[@REVISION]` for a model of the Hugging Face hub. A file may be
    one of this project, an official checkpoint, a Hugging Face folder, or published weights of the backbone alone. The
    folder of a run stands for its newest checkpoint. None keeps the random initialisation."""
    weights_are_deltas: bool = False
    """The backbone in `weights` is a difference to be added to the weights of `backbone.pretrained` or
    `backbone.weights`. The authors of EoMT publish their DINOv3 models as differences because the licence of DINOv3
    requires it."""
    freeze: tuple[FreezablePart, ...] = ()
    """Parts that training does not change, including the statistics of their norms. They get no gradients and no
    optimizer state, and no backward pass if nothing before them is trained. Use `[backbone]` for small data sets.
    `[backbone.vit]` is the transformer inside `backbone.kind` vit_adapter."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Means of red, green and blue (0 to 255) that are subtracted from the image. The defaults are ImageNet's."""
    pixel_std: Annotated[tuple[float, float, float], ABOVE_0] = (58.395, 57.12, 57.375)
    """Standard deviations of red, green and blue (0 to 255) by which the image is divided. The defaults are ImageNet's.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights or "").startswith(HUB):
            HubAddress.parse(self.weights or "")
        if (self.backbone.weights or "").startswith(HUB):
            HubAddress.parse(self.backbone.weights or "", "model.backbone.weights")
        self._check_package()
        self._check_parts()
        self._check_pilots()

    def require_trainable(self) -> None:
        """Raise ConfigError if `freeze` leaves nothing to train. Evaluation accepts such a model."""
        if set(get_args(ModelPart)) <= set(self.freeze):
            raise ConfigError(
                f"model.freeze is {list(self.freeze)}, the whole model, so nothing is trained; remove a part from it"
            )

    def _check_parts(self) -> None:
        if "backbone.vit" in self.freeze and not isinstance(self.backbone, ViTAdapterBackboneConfig):
            raise ConfigError(
                f"model.freeze has backbone.vit, which backbone.kind {self.backbone.kind} does not have; use [backbone]"
            )
        has_base = self.backbone.weights is not None or self.backbone.published_name is not None
        if self.weights_are_deltas and (self.weights is None or not has_base):
            raise ConfigError(
                f"model.weights_are_deltas is true and model.weights is {self.weights}; it needs model.weights and the "
                "base weights: set model.backbone.pretrained to true (for kind swin, to a timm name), or "
                "model.backbone.weights to a file"
            )
        kind, token_kinds = self.transformer_decoder.kind, ("eomt", "pmt")
        found = {
            "transformer_decoder.kind": (kind, kind if kind in token_kinds else " or ".join(token_kinds)),
            "pixel_decoder.kind": (self.pixel_decoder.kind, "upscale"),
            "backbone.features": (getattr(self.backbone, "features", "maps"), "tokens"),
        }
        is_set = [value == wanted for value, wanted in found.values()]
        if any(is_set) and not all(is_set):
            has = ", ".join(f"model.{name} {value}" for name, (value, _) in found.items())
            needs = ", ".join(f"{name} {wanted}" for name, (_, wanted) in found.items())
            raise ConfigError(f"{has} cannot be combined; set all of {needs}, or none of them")

    def _check_pilots(self) -> None:
        decoder = self.transformer_decoder
        if self.pilots.max_targets and not getattr(decoder, "supports_pilots", False):
            attention = f" with attention {found}" if (found := getattr(decoder, "attention", None)) else ""
            raise ConfigError(
                f"model.pilots.max_targets is {self.pilots.max_targets}, but model.transformer_decoder is "
                f"{decoder.kind}{attention}, which does not support pilots; set max_targets=0, or use the "
                "masked decoder with attention masked or mask_pooling"
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
