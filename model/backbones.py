"""Backbones: convolutional timm models as feature pyramids at strides 4, 8, 16 and 32."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BackboneConfig, TimmBackboneConfig
from model.errors import ConfigError

STRIDES = (4, 8, 16, 32)


def build_backbone(config: BackboneConfig, *, pretrained: bool = True) -> TimmBackbone:
    """Build the backbone of a recipe. With `pretrained=False` its weights are neither fetched nor read.

    Raises ConfigError for an unknown name, unusable options or weights, or a model without such features.
    """
    return TimmBackbone(config, pretrained=pretrained)


class TimmBackbone(nn.Module):
    """A timm model cut into four feature maps."""

    channels: tuple[int, ...]
    """Channels of the maps at strides 4, 8, 16, 32."""

    def __init__(self, config: TimmBackboneConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        starts_trained = pretrained and (config.pretrained or config.weights is not None)
        self.body = _create_timm(config, starts_trained)
        match config.norm:
            case "frozen_batch":
                _replace_batch_norms(self.body, FrozenBatchNorm2d.from_trained if starts_trained else FrozenBatchNorm2d)
            case "group":
                _replace_batch_norms(self.body, _group_norm_like)
            case "native":
                pass
        self.channels = _probe_channels(self.body, config.name)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`images` [B, 3, H, W] to maps [B, C_i, H / s, W / s] at strides s of 4, 8, 16, 32, rounded up.

        Sizes that 32 does not divide are padded with zeros first: some models would drop the last rows and columns.
        """
        height, width = images.shape[-2:]
        features = self.body(F.pad(images, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1])))
        return tuple(
            feature[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for feature, stride in zip(features, STRIDES, strict=True)
        )


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with fixed statistics and affine, all buffers: one fused kernel that keeps no activation for backward.

    Starts as the identity, as in Detectron2; a fresh BatchNorm may have zero gains, which would never recover here.
    """

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = source.eps
        self.register_buffer("weight", torch.ones(source.num_features))
        self.register_buffer("bias", torch.zeros(source.num_features))
        self.register_buffer("running_mean", torch.zeros(source.num_features))
        self.register_buffer("running_var", torch.ones(source.num_features) - source.eps)

    @classmethod
    def from_trained(cls, source: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """Freeze a BatchNorm as it is."""
        frozen = cls(source)
        for name, buffer in frozen.named_buffers():
            buffer.copy_(getattr(source, name).detach())
        return frozen

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and dtype."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (row.to(features.dtype).view(1, -1, 1, 1) for row in (scale, shift))
        return torch.addcmul(shift, features, scale)


def _group_norm_like(source: nn.BatchNorm2d) -> nn.GroupNorm:
    """GroupNorm in place of a BatchNorm, with its affine (residual branches may start at zero gain).

    About 16 channels a group: with a fixed number of groups, a narrow stage would be normalised channel by channel.
    """
    norm = nn.GroupNorm(math.gcd(max(1, source.num_features // 16), source.num_features), source.num_features)
    with torch.no_grad():
        norm.weight.copy_(source.weight)
        norm.bias.copy_(source.bias)
    return norm


def _replace_batch_norms(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    """Replace every BatchNorm below `module`; what timm fuses into one (dropout, activation) is kept behind it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fused = [part for key in ("drop", "act") if isinstance(part := getattr(child, key, None), nn.Module)]
            setattr(module, name, nn.Sequential(make(child), *fused) if fused else make(child))
        else:
            _replace_batch_norms(child, make)


def _create_timm(config: TimmBackboneConfig, starts_trained: bool) -> nn.Module:
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "`timm.list_models()` lists all names"
        raise ConfigError(f"model.backbone.name is {config.name!r}, which timm does not have; {hint}")
    overlay: dict[str, Any] = {}
    if starts_trained and config.weights is not None:
        # timm then adapts names and drops the classifier as it does with its own files.
        overlay["pretrained_cfg_overlay"] = {"state_dict": _read_weights(config.weights)}
    try:
        return timm.create_model(
            config.name,
            pretrained=starts_trained,
            features_only=True,
            out_indices=(-4, -3, -2, -1),
            **overlay,
            **config.options,
        )
    except Exception as error:
        raise ConfigError(
            f"model.backbone: timm cannot build {config.name!r} as a feature pyramid with options "
            f"{dict(config.options)} and weights {config.weights!r}: {error}"
        ) from error


def _read_weights(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"model.backbone.weights is {source!r}, which is not a file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"model.backbone.weights: {source} cannot be read as plain tensors: {error}") from error
    return state.get("state_dict", state.get("model", state))


@torch.no_grad()
def _probe_channels(body: nn.Module, name: str) -> tuple[int, ...]:
    """Run a small image through the model: the honest test of layout, strides and freedom of size."""
    height, width = 64, 96
    training = body.training
    try:
        features = body.eval()(torch.zeros(1, 3, height, width))
        shapes = [tuple(feature.shape) for feature in features]
    except Exception as error:
        raise ConfigError(
            f"model.backbone.name is {name!r}, which cannot process a {height} x {width} image: {error}. "
            "Choose a convolutional model, for example resnet50 or convnext_tiny"
        ) from error
    finally:
        body.train(training)
    wanted = [(height // stride, width // stride) for stride in STRIDES]
    if [shape[2:] for shape in shapes] != wanted:
        raise ConfigError(
            f"model.backbone.name is {name!r}, whose features of a {height} x {width} image have the shapes {shapes}; "
            "[batch, channels, height, width] at strides 4, 8, 16 and 32 are needed. "
            "Choose a convolutional model, for example resnet50 or convnext_tiny"
        )
    return tuple(shape[1] for shape in shapes)
