"""Hiera (Ryali et al., ICML 2023) for images of any size; timm's version is fixed to the size it was built for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.hiera import Hiera, Reroll, Unroll
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class AnySizeHiera(nn.Module):
    """The blocks of a timm Hiera, with position embeddings and token order computed for each image size.

    Models with absolute window embeddings (`hiera_*_abswin_*`) tile the window part and interpolate the rest, which
    keeps their quality at other sizes (Bolya et al., "Window attention is bugged", ICLR 2024).
    """

    def __init__(self, source: Hiera) -> None:
        """Take over the modules of `source`, which cannot be used afterwards."""
        super().__init__()
        self.patch_embed = source.patch_embed
        assert source.pos_embed is not None, "video models are not supported"
        self.pos_embed, self.pos_embed_win = source.pos_embed, source.pos_embed_win
        self.blocks = source.blocks
        self.grad_checkpointing = False
        self._grid = tuple(source.tokens_spatial_shape)
        self._stage_ends = list(source.stage_ends)
        self._patch_stride = tuple(source.patch_stride)
        self._pooling = [tuple(source.q_stride)] * (len(self._stage_ends) - 1)
        self._num_poolings = source.q_pool
        self.multiple = max(s * unit for s, unit in zip(self._patch_stride, source.mask_unit_size, strict=True))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, C_i, H_i, W_i] of all stages.

        `images` is [B, 3, H, W]; its sides must be divisible by `multiple`.
        """
        size = images.shape[-2:]
        grid = [side // stride for side, stride in zip(size, self._patch_stride, strict=True)]
        tokens = self.patch_embed(images) + self._positions(grid)
        tokens = Unroll(size, self._patch_stride, self._pooling)(tokens)
        reroll = Reroll(size, self._patch_stride, self._pooling, self._stage_ends, self._num_poolings)
        maps = []
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if index in self._stage_ends:
                maps.append(reroll(tokens, index).permute(0, 3, 1, 2))
        return maps

    def _positions(self, grid: list[int]) -> Tensor:
        """Return position embeddings [1, h * w, C] for a grid of h x w tokens."""
        if self.pos_embed_win is None:
            return resample_abs_pos_embed(self.pos_embed, grid, self._grid, num_prefix_tokens=0)
        windows = [side // unit for side, unit in zip(grid, self.pos_embed_win.shape[-2:], strict=True)]
        overall = F.interpolate(self.pos_embed, grid, mode="bicubic", antialias=True)
        return (overall + self.pos_embed_win.tile(windows)).flatten(2).transpose(1, 2)
