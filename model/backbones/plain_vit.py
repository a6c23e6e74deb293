"""Plain vision transformers of timm, split into tokens, blocks and norm.

Segmentation heads whose queries join the blocks need the parts separately.

Axis letters: B images, P class and register tokens, N patches, T all tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2f.model.backbones.timm_backbone import create_timm_model, require_timm_model
from m2f.model.config import TimmBackboneConfig
from m2f.model.constants import cache_constants
from m2f.model.errors import ConfigError

_PATCH = 16
"""Side of a patch in pixels. timm resamples the embedding of models with patches of 14, as the authors of EoMT do."""
_TEMPERATURE = 100.0
"""Base of the frequencies of rotary positions (DINOv3)."""

Grid = tuple[int, int]
"""Rows and columns of patches."""


class PatchTokens(nn.Module):
    """Turns images into class, register and patch tokens with learned or rotary positions."""

    def __init__(self, source: Any, rotary_dim: int) -> None:
        """Take over the parts of a timm model. `rotary_dim` is the width of a head, or 0 without rotary positions."""
        super().__init__()
        self.proj = source.patch_embed.proj
        self.cls_token, self.reg_token, self.pos_embed = source.cls_token, source.reg_token, source.pos_embed
        self.norm = getattr(source, "norm_pre", nn.Identity())
        self.patch: int = self.proj.kernel_size[0]
        self.prefix = sum(token.shape[1] for token in (self.cls_token, self.reg_token) if token is not None)
        self.grid, self._rotary_dim = tuple(source.patch_embed.grid_size), rotary_dim

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        """Return tokens [B, P + N, C], the table of `rotary_positions` or None, and the grid.

        `images` [B, 3, H, W] are padded with zeros to multiples of the patch size.
        """
        height, width = images.shape[-2:]
        patches = self.proj(F.pad(images, (0, -width % self.patch, 0, -height % self.patch)))
        grid = (patches.shape[-2], patches.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + self._learned_positions(grid)
        prefix = [
            token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        table = rotary_positions(grid, self._rotary_dim, images.device) if self._rotary_dim else None
        return self.norm(torch.cat([*prefix, tokens], dim=1)), table, grid

    def _learned_positions(self, grid: Grid) -> Tensor:
        if not isinstance(grid[0], torch.SymInt) and grid == self.grid:  # graphs for any size must not branch here
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=0)


class PlainVit(nn.Module):
    """Vision transformer whose tokens all have one stride. `embed`, `blocks` and `norm` can be called separately."""

    def __init__(self, config: TimmBackboneConfig, *, pretrained: bool = True) -> None:
        """Build the model. Raises ConfigError if timm cannot build it or if it is not a supported transformer."""
        super().__init__()
        use_pretrained = pretrained and (config.pretrained is True or config.weights is not None)
        require_timm_model(config)
        source = create_timm_model(config, use_pretrained, num_classes=0, dynamic_img_size=True, patch_size=_PATCH)
        _require_plain(source, config)
        heads = source.blocks[0].attn.num_heads
        has_rotary = isinstance(source, Eva)
        self.width: int = source.embed_dim
        self.channels = (self.width,)
        self.embed = PatchTokens(source, self.width // heads if has_rotary else 0)
        self.blocks = source.blocks
        self.norm = source.norm
        self.checkpointing = config.checkpointing

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised tokens [B, P + N, C] of `images` [B, 3, H, W]."""
        tokens, table, _ = self.embed(images)
        for block in self.blocks:
            tokens = self.run(block, tokens, table)
        return self.norm(tokens)

    def levels(self, images: Tensor, blocks: Sequence[int]) -> tuple[list[Tensor], Tensor | None, Grid]:
        """Return normalised tokens [B, P + N, C] after each of these blocks, and the table and grid of `embed`.

        Block indices start at 0 and are ascending.
        """
        tokens, table, grid = self.embed(images)
        found = []
        for index, block in enumerate(self.blocks[: blocks[-1] + 1]):
            tokens = self.run(block, tokens, table)
            if index in blocks:
                found.append(self.norm(tokens))
        return found, table, grid

    def run(self, block: nn.Module, tokens: Tensor, table: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Run one block on tokens [B, T, C]. `table` holds the rotary positions; see `embed` and `with_unrotated`.

        `mask` is bool [B, 1, T, T], True if a token (row) may attend to another (column).
        """
        positions = (table,) if isinstance(block, EvaBlock) else ()
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, *positions, attn_mask=mask, use_reentrant=False)
        return block(tokens, *positions, attn_mask=mask)


@cache_constants(4)
def rotary_positions(grid: Grid, dim: int, device: torch.device) -> Tensor:
    """Return sine and cosine [N, 2 * dim] of the rotation angles for heads of width `dim`.

    Patches are in row order.
    """
    return rotations(rotary_angles(grid, dim, device))


def rotations(angles: Tensor) -> Tensor:
    """Return the table [..., 2 * dim] that timm's blocks expect: the sines of angles [..., dim], then their cosines."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@cache_constants(4)
def rotary_angles(grid: Grid, dim: int, device: torch.device) -> Tensor:
    """Return angles [N, dim] in float32, independent of the model's precision.

    Patch centres are mapped to [-1, 1] along each axis; y comes before x.
    """
    axes = [(torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size * 2 - 1 for size in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    exponents = 2 * torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 2)
    return (2 * math.pi * centres[:, :, None] / _TEMPERATURE**exponents).flatten(1).tile(2)


def with_unrotated(table: Tensor | None, count: int) -> Tensor | None:
    """Return the table for sequences with `count` more tokens in front, which are not rotated.

    timm leaves the first P tokens unrotated and applies the table to all others. With the tokens in front, `count` of
    these others must not be rotated either, so the table starts with `count` rows of sine 0 and cosine 1.
    """
    if table is None:
        return None
    shape = (*table.shape[:-2], count, table.shape[-1] // 2)
    return torch.cat([torch.cat([table.new_zeros(shape), table.new_ones(shape)], dim=-1), table], dim=-2)


def _require_plain(source: Any, config: TimmBackboneConfig) -> None:
    """Raise ConfigError for models that these parts do not support."""
    is_dinov3 = isinstance(source, Eva) and source.pos_embed is None and type(source.blocks[0]) is EvaBlock
    is_vit = isinstance(source, VisionTransformer) and source.no_embed_class and source.pos_embed is not None
    if not (is_dinov3 or is_vit):
        raise ConfigError(
            f"model.backbone.name is {config.name!r}, which cannot provide tokens (model.backbone.features); choose a "
            "DINOv2 with registers (vit_large_patch14_reg4_dinov2), a DINOv3 (vit_large_patch16_dinov3_qkvb), or a "
            "plain vision transformer with options {no_embed_class: true}"
        )
