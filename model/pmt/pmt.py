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
"""Epsilon of the LayerNorms in and after the new blocks."""
_FIRST_WINDOW = 3000
"""Maximum number of steps in which the masks of the first block vanish, as the authors choose it."""
_LARGEST_STRETCH = 2.0
"""Largest factor by which training stretches positions, if the backbone has no rotary ones; the smallest is 1 / 2."""
_STREAM = 0x506D7453
"""Separates these random numbers from others of the same image."""


class Lateral(nn.Module):
    """Connection from one level of the backbone to the new blocks: batch norm, residual MLP and learned scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = SyncBatchNorm2d(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform [B, T, C]; the shape stays the same.

        In training, the statistics cover all tokens, class and register tokens included.
        """
        features = self.norm(tokens.flatten(0, 1)[..., None, None]).view(tokens.shape)
        return (features + self.fc2(F.gelu(self.fc1(features)))) * self.scale


class PmtDecoder(QueryHeads):
    """Query heads, lateral connections from the backbone's levels, and the new blocks with their final norm."""

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
    """New blocks with queries on top of the sum of several levels of a plain vision transformer.

    If the backbone is frozen (`model.freeze`), none of its activations are kept for a backward pass.
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
        """Set the mask probabilities for the next step; see Segmenter."""
        windows = self._config.annealing or default_annealing(self._config.num_layers, max_steps)
        probabilities = probabilities_at(windows, self._config.annealing_power, step)
        self.transformer_decoder.set_probabilities(probabilities)

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """Return predictions; see Segmenter. Images may have any size; masks have ceil(H / stride) rows."""
        decoder = self.transformer_decoder
        assert isinstance(decoder, PmtDecoder)
        features, table, grid = self.backbone.levels(images, self.levels)
        tokens = torch.stack(
            [lateral(feature) for lateral, feature in zip(decoder.laterals, features, strict=True)]
        ).sum(0)
        if table is None:
            table = self._own_positions(grid, images.device, context)
        encoded = Encoded(tokens, table, grid, (images.shape[-2], images.shape[-1]))
        return self.decode(list(decoder.blocks), decoder.norm, encoded, context)

    def _own_positions(self, grid: Grid, device: torch.device, context: TrainingContext | None) -> Tensor:
        """Return the table of rotary positions for a backbone without them.

        In training, the positions of each image are stretched by a random factor.
        """
        angles = rotary_angles(grid, self.backbone.width // self.backbone.blocks[0].attn.num_heads, device)
        if self.training and context is not None:
            angles = angles * position_stretches(context)[:, None, None, None]
        return rotations(angles)


def position_stretches(context: TrainingContext) -> Tensor:
    """Return factors [B] whose logarithm is uniform, derived only from the seed and the image's data position."""
    keys = mix(context.targets.position + signed((context.seed + _STREAM) * GOLDEN))
    return _LARGEST_STRETCH ** (2 * to_unit_interval(mix(keys + GOLDEN)) - 1)


def default_annealing(num_layers: int, max_steps: int) -> tuple[tuple[int, int], ...]:
    """Return the steps between which the masks of each block vanish, as the authors choose them."""
    sixth, gaps = max_steps / 6, max(1, num_layers - 2)
    starts = [sixth * (1.6 + 2.4 * block / gaps) for block in range(num_layers - 1)]
    first = (0, min(_FIRST_WINDOW, int(sixth)))
    return (first, *((int(start), int(start + sixth)) for start in starts))


def _levels(config: PmtDecoderConfig, depth: int) -> tuple[int, ...]:
    if config.levels is None:
        return tuple(sorted({max(0, depth * quarter // 4 - 1) for quarter in range(1, 5)}))
    if config.levels[-1] >= depth:
        raise ConfigError(
            f"model.transformer_decoder.levels is {list(config.levels)}, but the backbone has blocks 0 to {depth - 1}"
        )
    return config.levels
