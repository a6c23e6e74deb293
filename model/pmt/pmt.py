"""PMT (plain mask transformer on a frozen vision transformer, arXiv 2603.25398).

Axis letters: B images, P class and register tokens, N patches, T all tokens of an image, C channels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from m2f.model.backbones.batch_norms import SyncBatchNorm2d
from m2f.model.backbones.plain_vit import Grid, PlainVit, rotary_angles, rotations
from m2f.model.config import ModelConfig
from m2f.model.eomt.annealing import probabilities_at
from m2f.model.eomt.eomt import Encoded, QueryHeads, QuerySegmenter, Upscale
from m2f.model.errors import ConfigError
from m2f.model.pmt.config import PmtDecoderConfig
from m2f.model.random_bits import GOLDEN, mix, signed, to_unit_interval
from m2f.model.segmenter import TrainingContext
from m2f.model.structures import Predictions

_EPS = 1e-5
"""Of the LayerNorms in and above the new blocks."""
_FIRST_WINDOW = 3000
"""Steps in which the authors' masks of the first block vanish."""
_LARGEST_STRETCH = 2.0
"""Positions are stretched by 1 / 2 to 2 in training, where the backbone has no rotary ones."""
_STREAM = 0x506D7453
"""Keeps these numbers apart from other ones of the same image."""


class Lateral(nn.Module):
    """One level of the backbone on its way to the new blocks: norm over the batch, residual MLP, learned scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = SyncBatchNorm2d(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C] to the same; training takes the statistics of all tokens, prefix included."""
        features = self.norm(tokens.flatten(0, 1)[..., None, None]).view(tokens.shape)
        return (features + self.fc2(F.gelu(self.fc1(features)))) * self.scale


class PmtDecoder(QueryHeads):
    """The heads of the queries, the way from the backbone's levels to tokens, and the new blocks with their norm."""

    def __init__(self, config: PmtDecoderConfig, backbone: PlainVit, levels: int, num_classes: int) -> None:
        dim, heads = backbone.width, backbone.blocks[0].attn.num_heads
        super().__init__(config.num_queries, config.num_layers, dim, num_classes)
        self.laterals = nn.ModuleList(Lateral(dim) for _ in range(levels))
        norm = partial(nn.LayerNorm, eps=_EPS)
        shape = {"mlp_ratio": config.mlp_ratio, "num_prefix_tokens": backbone.embed.prefix, "rotate_half": True}
        self.blocks = nn.ModuleList(
            EvaBlock(dim, heads, init_values=1.0, norm_layer=norm, **shape) for _ in range(config.num_layers)
        )
        self.norm = norm(dim)


class Pmt(QuerySegmenter):
    """New blocks, which the queries pass, above the sum of several levels of a plain vision transformer.

    With a frozen backbone (`model.freeze`) nothing is kept of it for a backward pass.
    """

    def __init__(self, config: ModelConfig, backbone: PlainVit, num_classes: int) -> None:
        super().__init__(config)
        assert isinstance(config.transformer_decoder, PmtDecoderConfig)
        self._config = config.transformer_decoder
        self.levels = _levels(self._config, len(backbone.blocks))
        self.backbone = backbone
        self.pixel_decoder = Upscale(backbone.width, backbone.embed.patch)
        self.transformer_decoder = PmtDecoder(self._config, backbone, len(self.levels), num_classes)
        parts = ("backbone.blocks", "transformer_decoder.laterals", "transformer_decoder.blocks")
        inner = (f"{part}.{index}" for part in parts for index, _ in self.get_submodule(part).named_children())
        self.regions = ("backbone.embed", *inner, "pixel_decoder")

    def set_progress(self, step: int, max_steps: int) -> None:
        """See Segmenter."""
        windows = self._config.annealing or default_annealing(self._config.num_layers, max_steps)
        probabilities = probabilities_at(windows, self._config.annealing_power, step)
        self.transformer_decoder.set_probabilities(probabilities)

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """See Segmenter. Images may have any size; the masks have ceil(H / stride) rows."""
        decoder = self.transformer_decoder
        assert isinstance(decoder, PmtDecoder)
        features, table, grid = self.backbone.levels(images, self.levels)
        tokens = torch.stack([lateral(one) for lateral, one in zip(decoder.laterals, features, strict=True)]).sum(0)
        if table is None:
            table = self._own_positions(grid, images.device, context)
        encoded = Encoded(tokens, table, grid, (images.shape[-2], images.shape[-1]))
        return self.decode(list(decoder.blocks), decoder.norm, encoded, context)

    def _own_positions(self, grid: Grid, device: torch.device, context: TrainingContext | None) -> Tensor:
        """Rotary positions where the backbone has none, in training of each image stretched by another factor."""
        angles = rotary_angles(grid, self.backbone.width // self.backbone.blocks[0].attn.num_heads, device)
        if self.training and context is not None:
            angles = angles * position_stretches(context)[:, None, None, None]
        return rotations(angles)


def position_stretches(context: TrainingContext) -> Tensor:
    """Factors [B], whose logarithm is uniform, a function of seed and position of the image alone."""
    keys = mix(context.targets.position + signed((context.seed + _STREAM) * GOLDEN))
    return _LARGEST_STRETCH ** (2 * to_unit_interval(mix(keys + GOLDEN)) - 1)


def default_annealing(num_layers: int, max_steps: int) -> tuple[tuple[int, int], ...]:
    """The authors' windows of steps in which the masks of each block vanish."""
    sixth, gaps = max_steps / 6, max(1, num_layers - 2)
    starts = [sixth * (1.6 + 2.4 * block / gaps) for block in range(num_layers - 1)]
    first = (0, min(_FIRST_WINDOW, int(sixth)))
    return (first, *((int(start), int(start + sixth)) for start in starts))


def _levels(config: PmtDecoderConfig, depth: int) -> tuple[int, ...]:
    if config.levels is None:
        return tuple(sorted({max(0, depth * quarter // 4 - 1) for quarter in range(1, 5)}))
    if config.levels[-1] >= depth:
        raise ConfigError(
            f"model.transformer_decoder.levels is {list(config.levels)}; the backbone has the blocks 0 to {depth - 1}"
        )
    return config.levels
