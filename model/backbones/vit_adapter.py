"""ViT-Adapter: four maps from a plain vision transformer that stays unchanged and can therefore be frozen.

Source: Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023, in the form of DINOv3's published
segmentation head: convolutions and extractors, no injectors.

Axis letters: B images, N patches, T pixels of strides 8, 16 and 32, C channels of the vision transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.backbones.batch_norms import SyncBatchNorm2d
from m2f.model.backbones.plain_vit import Grid, PlainVit
from m2f.model.config import TimmBackboneConfig, ViTAdapterBackboneConfig
from m2f.model.deform_attn.module import MSDeformAttn, SamplingGrid
from m2f.model.errors import ConfigError
from m2f.model.layers import run_layer

STRIDES = (4, 8, 16, 32)
"""Strides of the maps. The extractors' tokens are the pixels of the last three."""
_PATCH = STRIDES[2]
"""Side of a patch in pixels: the tokens of the ViT are the pixels of this map."""
_POINTS = 4
"""Sampling points per token and head."""
_EPS = 1e-6
"""Epsilon of the extractors' LayerNorms."""
_EXTRACTORS = (1, 1, 1, 3)
"""Number of successive extractors for each of the four layers."""


class ViTAdapter(nn.Module):
    """A vision transformer and the adapter that makes four maps from its layers and the image."""

    channels: tuple[int, ...]
    """Channels of the maps at strides 4, 8, 16, 32; all equal those of the transformer."""
    first_part = "vit"
    """Name of the submodule whose layers all come before the others. Rates that decay with depth count from it."""

    def __init__(self, config: ViTAdapterBackboneConfig, *, pretrained: bool = True) -> None:
        """Build the model. Raises ConfigError if the transformer is not supported or does not fit the adapter."""
        super().__init__()
        source = TimmBackboneConfig(
            name=config.name,
            features="tokens",
            pretrained=config.pretrained,
            weights=config.weights,
            checkpointing=config.checkpointing,
            options=config.options,
        )
        self.vit = PlainVit(source, pretrained=pretrained)
        _require_fit(self.vit, config)
        width = self.vit.width
        self.channels = (width,) * len(STRIDES)
        self.layers = extraction_layers(len(self.vit.blocks))
        self.drop_path = config.drop_path
        self.checkpointing = config.checkpointing
        self.prior = ImagePrior(config.stem_width, width)
        self.level_embed = nn.Parameter(torch.empty(len(STRIDES) - 1, width))
        self.interactions = nn.ModuleList(
            nn.Sequential(*(Extractor(width, config.num_heads) for _ in range(count))) for count in _EXTRACTORS
        )
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norms = nn.ModuleList(SyncBatchNorm2d(width) for _ in STRIDES)
        nn.init.normal_(self.level_embed)
        for part in (self.prior, self.interactions, self.up):
            part.apply(_initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C, H / s, W / s] at strides s of 4, 8, 16, 32, rounded up, for `images` [B, 3, H, W].

        Sizes that 32 does not divide are padded with zeros.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        # Nothing before the transformer is trained, so a frozen transformer keeps no activations.
        found, _, grid = self.vit.levels(images, self.layers)
        layers = [tokens[:, self.vit.embed.prefix :] for tokens in found]
        stride4, *others = self.prior(images)
        shapes = [(level.shape[-2], level.shape[-1]) for level in others]
        tokens = self._extract(others, shapes, layers, grid)
        levels = tokens.transpose(1, 2).split([rows * columns for rows, columns in shapes], dim=2)
        others = [level.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        maps = [stride4 + self.up(others[0]), *others]
        layer_maps = [layer.transpose(1, 2).unflatten(2, grid) for layer in layers]
        features = [
            norm(level + F.interpolate(layer, level.shape[-2:], mode="bilinear", align_corners=False).to(level.dtype))
            for norm, level, layer in zip(self.norms, maps, layer_maps, strict=True)
        ]
        return tuple(
            feature[..., : -(-height // stride), : -(-width // stride)]  # integer arithmetic only, for torch.export
            for feature, stride in zip(features, STRIDES, strict=True)
        )

    def _extract(self, maps: Sequence[Tensor], shapes: list[Grid], layers: Sequence[Tensor], grid: Grid) -> Tensor:
        """Return the pixels of strides 8, 16 and 32 as tokens [B, T, C] that have attended to all layers."""
        flat = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(maps, self.level_embed, strict=True)
        ]
        # The residual stream keeps the parameters' dtype: float32 under autocast.
        tokens = torch.cat(flat, dim=1).to(self.level_embed.dtype)
        sampling_grid = _sampling_grid(shapes, grid, tokens.device)
        # Drawn before the extractors, so that recomputing a checkpointed one draws no random numbers.
        scales: Sequence[Tensor | None] = [None] * sum(_EXTRACTORS)
        if self.training and self.drop_path > 0:
            kept = torch.rand(len(scales), len(tokens), 1, 1, device=tokens.device) >= self.drop_path
            scales = (kept / (1 - self.drop_path)).to(tokens.dtype).unbind()
        pairs = zip(self.interactions, layers, strict=True)
        steps = [(extractor, layer) for extractors, layer in pairs for extractor in extractors.children()]
        for (extractor, layer), scale in zip(steps, scales, strict=True):
            tokens = run_layer(extractor, self.checkpointing, tokens, layer, sampling_grid, shapes, scale)
        return tokens


class ImagePrior(nn.Module):
    """Convolutions on the image that make the adapter's initial maps."""

    def __init__(self, stem: int, width: int) -> None:
        """Build the convolutions.

        `stem` is the number of channels of the first ones, `width` that of the transformer.
        """
        super().__init__()
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(*_convolution(3, stem, 2), *_convolution(stem, stem), *_convolution(stem, stem), pool)
        self.conv2 = nn.Sequential(*_convolution(stem, 2 * stem, 2))
        self.conv3 = nn.Sequential(*_convolution(2 * stem, 4 * stem, 2))
        self.conv4 = nn.Sequential(*_convolution(4 * stem, 4 * stem, 2))
        self.fc1 = nn.Conv2d(stem, width, 1)
        self.fc2 = nn.Conv2d(2 * stem, width, 1)
        self.fc3 = nn.Conv2d(4 * stem, width, 1)
        self.fc4 = nn.Conv2d(4 * stem, width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C, H / s, W / s] at strides s of 4, 8, 16, 32.

        `images` is [B, 3, H, W]; its sides must be divisible by 32.
        """
        stride4 = self.stem(images)
        stride8 = self.conv2(stride4)
        stride16 = self.conv3(stride8)
        return self.fc1(stride4), self.fc2(stride8), self.fc3(stride16), self.fc4(self.conv4(stride16))


class Extractor(nn.Module):
    """Deformable attention from the adapter's tokens to the patches of a layer, followed by a feed-forward network.

    The feed-forward network contains a depthwise convolution.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=_EPS)
        self.feat_norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = MSDeformAttn(width, 1, heads, _POINTS, value_dim=width // 2)
        self.ffn_norm = nn.LayerNorm(width, eps=_EPS)
        self.ffn = ConvolutionalFeedForward(width)

    def forward(
        self, tokens: Tensor, layer: Tensor, sampling_grid: SamplingGrid, shapes: Sequence[Grid], scale: Tensor | None
    ) -> Tensor:
        """Update `tokens` [B, T, C] from `layer` [B, N, C].

        `shapes` are (height, width) of the maps that the tokens come from; `scale` [B, 1, 1] is the drop-path factor or
        None.
        """
        tokens = tokens + self.attn(self.query_norm(tokens), self.feat_norm(layer), sampling_grid)
        transformed = self.ffn(self.ffn_norm(tokens), shapes)
        return tokens + (transformed if scale is None else scale * transformed)


class ConvolutionalFeedForward(nn.Module):
    """Two linear layers with a depthwise convolution between them, which the three maps share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // 4
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, shapes: Sequence[Grid]) -> Tensor:
        """Transform `tokens` [B, T, C]; `shapes` are (height, width) of the maps they come from."""
        levels = self.fc1(tokens).split([rows * columns for rows, columns in shapes], dim=1)
        maps = [level.transpose(1, 2).unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        mixed = torch.cat([self.dwconv(level).flatten(2).transpose(1, 2) for level in maps], dim=1)
        return self.fc2(F.gelu(mixed))


def extraction_layers(depth: int) -> tuple[int, ...]:
    """Return the blocks, from 0, whose outputs the adapter reads: the last of each quarter, rounded down.

    `depth` is at least 4. For 24 blocks, DINOv3 takes block 4 instead of 5.
    """
    return (4, 11, 17, 23) if depth == 24 else tuple(quarter * depth // 4 - 1 for quarter in range(1, 5))


def _sampling_grid(shapes: list[Grid], grid: Grid, device: torch.device) -> SamplingGrid:
    """Return the grid in which every pixel of the maps samples at its own position among the patches."""
    centres = SamplingGrid.of_pixels(shapes, device).reference
    return SamplingGrid([grid], SamplingGrid.of_pixels([grid], device).sizes, centres)


def _convolution(in_channels: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return layer, SyncBatchNorm2d(channels), nn.ReLU(inplace=True)


def _initialise(module: nn.Module) -> None:
    match module:
        case MSDeformAttn():
            module.reset_parameters()
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        case nn.Conv2d() | nn.ConvTranspose2d():
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _require_fit(vit: PlainVit, config: ViTAdapterBackboneConfig) -> None:
    where = f"model.backbone.name is {config.name!r} with options {dict(config.options)}"
    if len(vit.blocks) < len(STRIDES):
        raise ConfigError(
            f"{where}; the ViT-Adapter reads {len(STRIDES)} blocks, but this has only {len(vit.blocks)}; choose a "
            "deeper transformer, or set options.depth to at least 4"
        )
    if vit.embed.patch != _PATCH:
        raise ConfigError(f"{where}; the ViT-Adapter needs patches of {_PATCH} pixels; remove patch_size")
    if vit.width % (2 * config.num_heads) or vit.width % 4:
        raise ConfigError(
            f"{where}; its {vit.width} channels must be a multiple of 4 and of twice model.backbone.num_heads "
            f"({config.num_heads})"
        )
