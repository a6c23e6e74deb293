"""Swin Transformer (Liu et al., ICCV 2021) with the arithmetic of the published Mask2Former weights.

It differs from timm's Swin on maps that the window does not divide. Maps are padded before they are rolled, windows
never shrink, and padding takes part in attention. Every output has its own LayerNorm. Names are the official ones.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2f.model.config import SwinBackboneConfig

_PATCH = 4
"""Side of a patch in pixels."""
_MLP_RATIO = 4
"""Width of the MLP's hidden layer relative to the tokens. All published Swins use this ratio and patch size."""
_CROSS_REGION_BIAS = -100.0
"""Added to the attention logits between pixels that are neighbours only because of the roll; the published value."""


class SwinTransformer(nn.Module):
    """Four stages of window attention. The output of each stage is normalised for the pixel decoder."""

    channels: tuple[int, ...]
    """Channels of the maps at strides 4, 8, 16, 32."""

    def __init__(self, config: SwinBackboneConfig) -> None:
        super().__init__()
        self.channels = tuple(config.embed_dim * 2**stage for stage in range(len(config.depths)))
        self._depths = config.depths
        self.drop_path = config.drop_path
        self.checkpointing = config.checkpointing
        self.patch_embed = PatchEmbedding(config.embed_dim)
        self.layers = nn.ModuleList()
        for stage, (width, depth, heads) in enumerate(zip(self.channels, config.depths, config.num_heads, strict=True)):
            is_last = stage == len(config.depths) - 1
            self.layers.append(Stage(width, depth, heads, config.window_size, merges=not is_last))
            self.add_module(f"norm{stage}", nn.LayerNorm(width))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C_i, H / s, W / s] at strides s of 4, 8, 16, 32, rounded up, for `images` [B, 3, H, W].

        The maps are channels-last in memory.
        """
        tokens = self.patch_embed(images)
        # Drawn before the blocks, so that recomputing a checkpointed block draws no random numbers.
        is_drawn = self.training and self.drop_path > 0
        scales = draw_drop_path_scales(self.drop_path, sum(self._depths), tokens) if is_drawn else None
        maps = []
        for index, (stage, end) in enumerate(zip(self.layers, accumulate(self._depths), strict=True)):
            of_stage = None if scales is None else scales[end - self._depths[index] : end]
            tokens, merged = stage(tokens, of_stage, self.checkpointing and torch.is_grad_enabled())
            maps.append(self.get_submodule(f"norm{index}")(tokens).permute(0, 3, 1, 2))
            tokens = merged
        return tuple(maps)


class PatchEmbedding(nn.Module):
    """Turns images into tokens of 4 x 4 pixels. Sizes that 4 does not divide are padded with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, _PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] to [B, H / 4, W / 4, C], rounded up."""
        height, width = images.shape[-2:]
        patches = self.proj(F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH)))
        return self.norm(patches.permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks at one resolution, every second one with shifted windows, followed by patch merging."""

    def __init__(self, width: int, depth: int, heads: int, window: int, *, merges: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2
        self.blocks = nn.ModuleList(
            Block(width, heads, window, shift=self.shift if index % 2 else 0) for index in range(depth)
        )
        self.downsample = PatchMerging(width) if merges else None

    def forward(self, tokens: Tensor, scales: Tensor | None, checkpointing: bool) -> tuple[Tensor, Tensor]:
        """Return the tokens after the blocks and those of the next stage; after the last stage, both are the same.

        `tokens` is [B, H, W, C]; `scales` [depth, 2, B] are the drop-path factors or None.
        """
        height, width = (side + window_padding(side, self.window) for side in tokens.shape[1:3])
        mask = shift_mask(height, width, self.window, self.shift, tokens)
        for index, block in enumerate(self.blocks):
            inputs = (tokens, mask, None if scales is None else scales[index])
            if checkpointing:
                tokens = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(*inputs)
        return tokens, tokens if self.downsample is None else self.downsample(tokens)


class Block(nn.Module):
    """Window attention and MLP, each in a residual branch that starts with a LayerNorm."""

    def __init__(self, width: int, heads: int, window: int, *, shift: int) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor, mask: Tensor, scales: Tensor | None) -> Tensor:
        """Update `tokens` [B, H, W, C].

        `mask` is that of `shift_mask`; `scales` [2, B] are the drop-path factors or None.
        """
        attended = self._attend(self.norm1(tokens), mask if self.shift else None)
        tokens = tokens + (attended if scales is None else scales[0, :, None, None, None] * attended)
        transformed = self.mlp(self.norm2(tokens))
        return tokens + (transformed if scales is None else scales[1, :, None, None, None] * transformed)

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        height, width = tokens.shape[1:3]
        padded = F.pad(tokens, (0, 0, 0, window_padding(width, self.window), 0, window_padding(height, self.window)))
        shape = padded.shape
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), dims=(1, 2))
        attended = merge_windows(self.attn(split_windows(padded, self.window), mask), shape, self.window)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), dims=(1, 2))
        return attended[:, :height, :width]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        # Not a weight, so it is not in the state dict. Loaders skip it in official files.
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend inside `windows` [B * M, N, C], with M windows per image and N pixels per window.

        `mask` [M, N, N] is added to the logits.
        """
        queries, keys, values = self.qkv(windows).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            # [M, heads, N, N], repeated per image: fused kernels need the same batch size for mask and queries.
            bias = (bias + mask[:, None]).repeat(windows.shape[0] // mask.shape[0], 1, 1, 1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.to(queries.dtype))
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform [..., C]; the shape stays the same."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens into one of twice the width. Odd maps are padded with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, H, W, C] to [B, H / 2, W / 2, 2C], rounded up."""
        height, width = tokens.shape[1:3]
        padded = F.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))
        quads = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, 2, W / 2, 2, C]
        # The weights expect column order: top left, bottom left, top right, bottom right.
        return self.reduction(self.norm(quads.permute(0, 1, 3, 4, 2, 5).flatten(3)))


def draw_drop_path_scales(rate: float, depth: int, tokens: Tensor) -> Tensor:
    """Return factors [depth, 2, B] for the residual branches of `depth` blocks on `tokens` [B, ...].

    A factor is 0 if a sample skips the branch, otherwise 1 / P(kept). P(skipped) grows linearly from 0 to `rate`.
    """
    kept = 1 - torch.linspace(0, rate, depth, device=tokens.device)[:, None, None]
    draws = torch.rand(depth, 2, len(tokens), device=tokens.device)
    return ((draws < kept) / kept).to(tokens.dtype)


def window_padding(size: int, window: int) -> int:
    """Return the number of tokens to add to a side of `size` to reach a multiple of the window.

    The formula uses a quotient instead of `-size % window`, for which torch.export cannot prove that the window divides
    the sum. The dividend is positive because ONNX rounds quotients towards zero.
    """
    return (size + window - 1) // window * window - size


def split_windows(tokens: Tensor, window: int) -> Tensor:
    """Split [B, H, W, C] into windows [B * M, window * window, C]. Images are outermost, then rows of windows."""
    grid = _copy(tokens.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3))
    return grid.flatten(3, 4).flatten(0, 2)


def merge_windows(windows: Tensor, shape: torch.Size, window: int) -> Tensor:
    """Invert `split_windows` for tokens of this shape."""
    batch, height, width, channels = shape
    grid = windows.view(batch, height // window, width // window, window, window, channels)
    return _copy(grid.transpose(2, 3)).flatten(3, 4).flatten(1, 2)


def _copy(grid: Tensor) -> Tensor:
    """Copy explicitly, as `flatten` does with several windows. Without it, a graph would depend on their number."""
    return grid.clone(memory_format=torch.contiguous_format)


def relative_position_index(window: int) -> Tensor:
    """Return [N, N] int64: the row of the bias table for every pair of the N = window * window pixels."""
    offsets = torch.arange(window)
    distance = offsets[:, None] - offsets + window - 1  # [window, window] in 0..2 * window - 2
    index = distance[:, None, :, None] * (2 * window - 1) + distance[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


def shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return [M, N, N] for a padded map rolled by `shift`: 0 inside a region of the image, -100 between regions.

    The roll moves the first rows next to the last ones. A window that contains both must not mix them.
    """
    rows, columns = (
        (steps >= size - window).int() + (steps >= size - shift)
        for size in (height, width)
        for steps in (torch.arange(size, device=like.device),)
    )
    regions = split_windows((3 * rows[:, None] + columns)[None, :, :, None], window).squeeze(2)
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, _CROSS_REGION_BIAS).to(like.dtype)


def _initialise(module: nn.Module) -> None:
    match module:
        case nn.Linear():
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case WindowAttention():
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
