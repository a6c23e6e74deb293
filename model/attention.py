"""The kinds of attention that a transformer decoder is made of.

Axis letters: B images, Q queries, T pixels of the levels that a layer attends to, C channels, h x w pixels of a level.
The rows of Table 4c of the paper: masked (`attention_mask`), plain cross-attention (`ProjectedAttention` without
a mask), spatially modulated co-attention (`SpatialPrior`) and mask pooling (`MaskPooling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPATIAL_BANDWIDTH = 8.0
"""Divides the squared distances of the spatial prior (beta in the SMCA paper)."""


def packed_xavier_(linear: nn.Linear) -> None:
    """Initialise a part of an attention's packed [3 C, C] input projection: xavier bound of the whole, zero bias."""
    bound = (6 / (4 * linear.in_features)) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, T, C] to [B, heads, T, C / heads] without a copy."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def to_at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _output_projection(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ProjectedAttention(nn.Module):
    """Attention over projected queries, keys and values, and the output projection.

    `norm` is the LayerNorm of its residual, which the layer applies before or after.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.output = _output_projection(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """`query` [B, Q, C], `key` and `value` [B, T, C]: [B, Q, C].

        `mask` is bool [B, 1, Q, T], True where allowed, or a number [B, heads, Q, T] added to the logits.
        """
        dropout = self.dropout if self.training else 0.0
        query, key, value = (split_heads(tokens, self.heads) for tokens in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        projected = self.output(attended.transpose(1, 2).flatten(2))
        return F.dropout(projected, dropout, self.training)


class MaskPooling(nn.Module):
    """The mean feature inside the predicted mask of each query, and a projection (Table 4c).

    K-Net (Zhang et al., NeurIPS 2021) gathers the group feature of a kernel so, as a sum; the mean is how the paper
    describes it, and keeps large and small masks on one scale. Without softmax a projection of values would commute
    with the mean, so that one projection after it does the work of both.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.output = _output_projection(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`tokens` [B, T, C] and `mask` bool [B, 1, Q, T] with at least one True in every row: [B, Q, C]."""
        inside = mask[:, 0]
        # An area of some thousand pixels has more digits than bfloat16.
        pooled = to_at_least_float32(inside.to(tokens.dtype) @ tokens) / inside.sum(-1, keepdim=True)
        return F.dropout(self.output(pooled.to(tokens.dtype)), self.dropout, self.training)


class SpatialPrior(nn.Module):
    """Gaussian prior of one layer and all its heads on where in the image a query attends to (SMCA).

    Spatially modulated co-attention (Gao et al., ICCV 2021, section 3.2; "type3" of its published code): around a
    reference point per query, every head predicts an offset of its centre and a width along x and y; the logarithm of
    the Gaussian is added to the attention logits. Distances are counted in pixels of the 1/32 map on every level, so
    that a prior means the same on all of them. Scales start at 1, independent of the query.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.offset = nn.Linear(dim, 2 * heads)
        self.scale = nn.Linear(dim, 2 * heads)
        nn.init.xavier_uniform_(self.offset.weight)
        nn.init.zeros_(self.scale.weight)
        nn.init.ones_(self.scale.bias)

    def forward(self, queries: Tensor, reference: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, heads, Q, T] from `queries` with their embedding [B, Q, C] and `reference` [B, Q, 2].

        References are (x, y) in [0, 1]. `sizes` are (h, w), first of the 1/32 map and then of the attended levels.
        """
        (rows, columns), *levels = sizes
        hidden = self.norm(queries)
        # [2, B, heads, Q] each; geometry in float32
        offset, scale = (
            to_at_least_float32(linear(hidden)).unflatten(-1, (self.heads, 2)).permute(3, 0, 2, 1)
            for linear in (self.offset, self.scale)
        )
        x, y = to_at_least_float32(reference).permute(2, 0, 1)[:, :, None]
        centre_x, centre_y = x * columns + offset[0], y * rows + offset[1]
        logits = []
        for height, width in levels:
            # The Gaussian is a product of one along x and one along y.
            along_x = _squared_distance(centre_x, width, columns) * scale[0].square()[..., None]
            along_y = _squared_distance(centre_y, height, rows) * scale[1].square()[..., None]
            logits.append((along_y[..., :, None] + along_x[..., None, :]).flatten(-2))
        return (torch.cat(logits, dim=-1) / -SPATIAL_BANDWIDTH).to(hidden.dtype)


def _squared_distance(centre: Tensor, size: int, extent: int) -> Tensor:
    """From centres [...] to the middles of `size` pixels that together are `extent` long: [..., size]."""
    pixels = (torch.arange(size, device=centre.device, dtype=centre.dtype) + 0.5) * (extent / size)
    return (pixels - centre[..., None]).square()


def attention_mask(mask_embeddings: Tensor, features: Tensor) -> Tensor:
    """Pixels that each query may attend to: bool [B, 1, Q, T] (equation 2 and 3 of the paper).

    `mask_embeddings` [B, Q, C] and `features` [B, C, T], the mask features resized to the level. Resizing features
    equals resizing the logits, because both are linear. A query whose mask is empty may attend everywhere.
    """
    with torch.autocast(features.device.type, enabled=False):
        allowed = (mask_embeddings.to(features.dtype) @ features) >= 0
    allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
    return allowed[:, None]


@torch.no_grad()
def resize_for_attention(mask_features: Tensor, size: Sequence[int]) -> Tensor:
    """Mask features bilinearly resized to a level, in float32 at least: [B, C, h * w]."""
    features = to_at_least_float32(mask_features)
    return F.interpolate(features, tuple(size), mode="bilinear", align_corners=False).flatten(2)
