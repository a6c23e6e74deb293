"""timm models as feature pyramids at strides 4, 8, 16 and 32, for images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from timm.models import model_entrypoint
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from m2f.model.backbones.batch_norms import FrozenBatchNorm2d, SyncBatchNorm2d, group_norm_like, replace_batch_norms
from m2f.model.backbones.feature_pyramid import SimpleFeaturePyramid
from m2f.model.backbones.hiera import AnySizeHiera
from m2f.model.backbones.timm_names import name_problem
from m2f.model.backbones.weight_checks import require_weights_of
from m2f.model.config import TimmBackboneConfig
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.weights.files import read_state
from m2f.model.weights.names import to_timm_names
from m2f.model.weights.packages import packaged_weights, rename_by_order, weights_path
from m2f.model.weights.sources import PACKAGE

STRIDES = (4, 8, 16, 32)
"""Strides of the four maps that pixel decoders expect."""
_MAX_REASON = 400
"""Maximum number of characters of torch's list of missing and unexpected names in an error message."""
_VIT_PATCH = 16
"""Patch size of plain transformers in pixels. The simple feature pyramid expects maps of this stride."""


class TimmBackbone(nn.Module):
    """A timm model that returns four feature maps."""

    channels: tuple[int, ...]
    """Channels of the maps at strides 4, 8, 16, 32."""

    def __init__(self, config: TimmBackboneConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        use_pretrained = pretrained and (config.pretrained is True or config.weights is not None)
        self.body = _create_body(config, use_pretrained)
        match config.norm:
            case "frozen_batch":
                replace_batch_norms(self.body, FrozenBatchNorm2d.from_trained if use_pretrained else FrozenBatchNorm2d)
            case "sync_batch":
                replace_batch_norms(self.body, SyncBatchNorm2d.like)
            case "group":
                replace_batch_norms(self.body, group_norm_like)
            case "native":
                pass
        self.multiple = _required_multiple(self.body)
        self._has_depthwise = any(
            isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in self.body.modules()
        )
        self.channels = self._probe_channels(config.name)
        if config.checkpointing:
            _enable_checkpointing(self.body, config)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C_i, H / s, W / s] at strides s of 4, 8, 16, 32, rounded up, for `images` [B, 3, H, W].

        Images are first padded with zeros to sizes that `multiple` divides. Without padding, some models would drop the
        last rows and columns, and others would mix opposite borders.
        """
        height, width = images.shape[-2:]
        features = self._maps(F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple)))
        return tuple(
            feature[..., : -(-height // stride), : -(-width // stride)]  # integer arithmetic only, for torch.export
            for feature, stride in zip(features, STRIDES, strict=True)
        )

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.training and self._has_depthwise and images.device.type == "cpu":
            # Depthwise convolutions are two to seven times faster channels-last; dense ones are slower.
            maps = self.body(images.contiguous(memory_format=torch.channels_last))
            return [features.contiguous() for features in self._channels_first(maps)]
        return self._channels_first(self.body(images))

    def _channels_first(self, maps: Sequence[Tensor]) -> list[Tensor]:
        is_channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
        return [features.permute(0, 3, 1, 2) for features in maps] if is_channels_last else list(maps)

    @torch.no_grad()
    def _probe_channels(self, name: str) -> tuple[int, ...]:
        """Return the channels of the maps.

        Runs a small image to check layout and strides, and that any size is accepted.
        """
        height, width = 64, 96
        training = self.training
        try:
            features = self.eval()._maps(torch.zeros(1, 3, height, width))
            shapes = [tuple(feature.shape) for feature in features]
        except Exception as error:
            raise ConfigError(
                f"model.backbone.name is {name!r}, which cannot process a {height} x {width} image: {error}. "
                "Choose a model for images of any size, for example resnet50 or convnext_tiny"
            ) from error
        finally:
            self.train(training)
        expected = [(height // stride, width // stride) for stride in STRIDES]
        if [shape[2:] for shape in shapes] != expected:
            raise ConfigError(
                f"model.backbone.name is {name!r}, whose features of a {height} x {width} image have the shapes "
                f"{shapes}; [batch, channels, height, width] at strides 4, 8, 16 and 32 are needed. "
                "Choose a model with such features, for example resnet50 or convnext_tiny"
            )
        return tuple(shape[1] for shape in shapes)


class PyramidTransformer(nn.Module):
    """Vision transformer with all features at one stride, followed by a simple feature pyramid."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        self.model = model
        self.pyramid = SimpleFeaturePyramid(model.num_features)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return four maps for images [B, 3, H, W] with sides divisible by 32.

        The tokens of the last block pass through the model's final norm.
        """
        (features,) = self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        return self.pyramid(features)


def _create_body(config: TimmBackboneConfig, use_pretrained: bool) -> nn.Module:
    """Return the module that makes four maps from images whose sides are multiples of `_required_multiple`."""
    require_timm_model(config)
    pyramid = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    match model_entrypoint(config.name).__module__.rpartition(".")[2]:
        case "swin_transformer":
            raise ConfigError(
                f"model.backbone.name is {config.name!r}, whose arithmetic in timm differs from the published one on "
                "most image sizes; use model.backbone.kind swin"
            )
        case "vision_transformer" | "eva" | "deit":
            # Positions are interpolated to every image size. Patches of 14 are resampled to 16 for strides 4 to 32.
            any_size = {"dynamic_img_size": True, "patch_size": _VIT_PATCH}
            return PyramidTransformer(create_timm_model(config, use_pretrained, num_classes=0, **any_size))
        case "hiera":
            return AnySizeHiera(create_timm_model(config, use_pretrained, num_classes=0))
        case "swin_transformer_v2":
            return create_timm_model(config, use_pretrained, strict_img_size=False, feature_cls="getter", **pyramid)
        case _:
            return create_timm_model(config, use_pretrained, **pyramid)


def require_timm_model(config: TimmBackboneConfig) -> None:
    """Raise ConfigError with similar names if timm does not have the model."""
    if (problem := name_problem(config.name)) is not None:
        raise ConfigError(f"model.backbone.name is {config.name!r}, {problem}")


def create_timm_model(config: TimmBackboneConfig, use_pretrained: bool, **settings: Any) -> Any:
    """Create a timm model with `settings`, overridden by the recipe's options, and its weights if requested."""
    settings |= dict(config.options)
    state: dict[str, Tensor] = {}
    if use_pretrained and config.weights is not None:
        try:
            state = _read_weights(config.weights)
        except WeightsError as error:
            raise ConfigError(f"model.backbone.weights: {error}") from error
        # timm adapts names and drops the classifier as it does for its own files.
        settings["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
    try:
        model = timm.create_model(config.name, pretrained=use_pretrained, **settings)
    except Exception as error:
        if state and "loading state_dict" in str(error):  # torch's list of missing and unexpected names
            raise ConfigError(
                f"model.backbone.weights is {config.weights}, which does not fit {config.name!r} with options "
                f"{dict(config.options)}: {' '.join(str(error).split())[:_MAX_REASON]}; set model.backbone (name, "
                "options) to that of the file, or choose other weights"
            ) from error
        raise ConfigError(
            f"model.backbone: timm cannot build {config.name!r} with options {dict(config.options)} and weights "
            f"{config.weights!r}: {error}"
        ) from error
    if state:
        require_weights_of(model, state, config)
    return model


def _read_weights(weights: str) -> dict[str, Tensor]:
    """Return tensors with timm's names, from a file that may include the classifier."""
    state = read_state(weights_path(weights))
    if not weights.startswith(PACKAGE):
        return to_timm_names(state)
    known = packaged_weights(weights)
    with torch.device("meta"):
        names = list(timm.create_model(known.model).state_dict())
    renamed = rename_by_order(state, names)
    return {name: tensor for name, tensor in renamed.items() if name.partition(".")[0] not in known.head}


def _required_multiple(body: nn.Module) -> int:
    """Return the number that must divide the sides of an image, so that no stage has to pad its map."""
    if isinstance(body, AnySizeHiera):
        return math.lcm(STRIDES[-1], body.multiple)
    sides = [STRIDES[-1]]
    if isinstance(model := getattr(body, "model", None), SwinTransformerV2):
        # It rolls before it pads, so padding inside a stage would mix opposite borders.
        stages: Any = model.layers
        for stride, stage in zip(STRIDES, stages, strict=True):
            sides += [stride * side for side in stage.blocks[0].window_size]
    return math.lcm(*sides)


def _disable_inplace(body: nn.Module) -> None:
    """Prevent stages from overwriting their inputs, which checkpointing keeps.

    Before timm 1.0.31, a ReLU of the stem is a separate stage and works in place.
    """
    if Version(timm.__version__) < Version("1.0.31"):
        for stage in body.children():
            if getattr(stage, "inplace", False) is True:
                cast(Any, stage).inplace = False


def _enable_checkpointing(body: nn.Module, config: TimmBackboneConfig) -> None:
    """Enable checkpointing, block by block if the model's parts support it, otherwise stage by stage."""
    where = f"model.backbone.checkpointing is true, but {config.name!r}"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in body.modules()):
        raise ConfigError(
            f"{where} with norm {config.norm!r} would count every batch twice in its running statistics; "
            "set norm to frozen_batch or group"
        )
    parts: list[Any] = [
        module for module in body.modules() if module is not body and hasattr(module, "grad_checkpointing")
    ]
    for part in parts:
        part.grad_checkpointing = True
    if parts:
        return
    if isinstance(body, AnySizeHiera):
        body.grad_checkpointing = True
    elif callable(enable := getattr(body, "set_grad_checkpointing", None)):
        enable(True)
        _disable_inplace(body)
    else:
        raise ConfigError(f"{where} has no activation checkpointing in timm; set it to false")
