"""Attention variants of the transformer decoder.

Axis letters: B images, Q queries, T pixels of the levels that a layer attends to, C channels, h x w pixels of a level.
The module implements the rows of Table 4c of the paper: masked attention (`attention_mask`), plain cross-attention
(`ProjectedAttention` without a mask), spatially modulated co-attention (`SpatialPrior`) and mask pooling
(`MaskPooling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPATIAL_BANDWIDTH = 8.0
"""Divisor of the squared distances in the spatial prior (beta in the SMCA paper)."""


def packed_xavier_(linear: nn.Linear) -> None:
    """Initialise a projection from C channels to queries, keys or values, of one or several layers.

    Weights are uniform within the Xavier bound of the packed [3 C, C] matrix of torch's MultiheadAttention. The bias is
    zero.
    """
    bound = (6 / (4 * linear.in_features)) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Reshape [B, T, C] to [B, heads, T, C / heads] without a copy."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def to_at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it already has that dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _output_projection(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ProjectedAttention(nn.Module):
    """Attention over projected queries, keys and values, followed by the output projection.

    `norm` is the LayerNorm of the residual branch. The calling layer applies it, either before or after this module.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.output = _output_projection(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return attended features [B, Q, C] for `query` [B, Q, C] and `key`, `value` [B, T, C].

        `mask` is either bool [B, 1, Q, T], True where attention is allowed, or a float [B, heads, Q, T] that is added
        to the logits.
        """
        dropout = self.dropout if self.training else 0.0
        query, key, value = (split_heads(tokens, self.heads) for tokens in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        projected = self.output(attended.transpose(1, 2).flatten(2))
        return F.dropout(projected, dropout, self.training)


class MaskPooling(nn.Module):
    """Mean feature inside the predicted mask of each query, followed by a projection (Table 4c).

    K-Net (Zhang et al., NeurIPS 2021) sums the features inside the mask of each kernel. This module takes the mean, as
    the paper describes, so the scale does not depend on the mask's area. A value projection commutes with the mean.
    Therefore one projection after the mean replaces both the value and the output projection.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.output = _output_projection(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pool `tokens` [B, T, C] inside `mask` bool [B, 1, Q, T] to [B, Q, C].

        Every row of `mask` must have at least one True.
        """
        inside = mask[:, 0]
        # bfloat16 cannot represent areas of thousands of pixels exactly.
        pooled = to_at_least_float32(inside.to(tokens.dtype) @ tokens) / inside.sum(-1, keepdim=True)
        return F.dropout(self.output(pooled.to(tokens.dtype)), self.dropout, self.training)


class SpatialPrior(nn.Module):
    """Gaussian prior over the image positions that a query attends to, for one layer and all its heads (SMCA).

    Spatially modulated co-attention is described by Gao et al., ICCV 2021, section 3.2; this is "type3" of the
    published code. Every query has a reference point. Every head predicts an offset of the Gaussian's centre from that
    point, and an inverse width along x and y. The logarithm of the Gaussian is added to the attention logits. On every
    level, distances are measured in pixels of the 1/32 map, so a prior is equally wide on all levels. The scales start
    at 1 for every query.
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
        """Return attention logits [B, heads, Q, T].

        Args:
            queries: [B, Q, C], positional embedding included.
            reference: [B, Q, 2] reference points (x, y) in [0, 1].
            sizes: (h, w) of the 1/32 map, followed by those of the attended levels.
        """
        (rows, columns), *levels = sizes
        hidden = self.norm(queries)
        # [2, B, heads, Q] each; the geometry is computed in float32
        offset, scale = (
            to_at_least_float32(linear(hidden)).unflatten(-1, (self.heads, 2)).permute(3, 0, 2, 1)
            for linear in (self.offset, self.scale)
        )
        x, y = to_at_least_float32(reference).permute(2, 0, 1)[:, :, None]
        centre_x, centre_y = x * columns + offset[0], y * rows + offset[1]
        logits = []
        for height, width in levels:
            # The Gaussian is separable: its logarithm is a sum of one term along x and one along y.
            along_x = _squared_distance(centre_x, width, columns) * scale[0].square()[..., None]
            along_y = _squared_distance(centre_y, height, rows) * scale[1].square()[..., None]
            logits.append((along_y[..., :, None] + along_x[..., None, :]).flatten(-2))
        return (torch.cat(logits, dim=-1) / -SPATIAL_BANDWIDTH).to(hidden.dtype)


def _squared_distance(centre: Tensor, size: int, extent: int) -> Tensor:
    """Return squared distances [..., size] from centres [...] to the middles of `size` pixels.

    The pixels together are `extent` long, starting at 0.
    """
    pixels = (torch.arange(size, device=centre.device, dtype=centre.dtype) + 0.5) * (extent / size)
    return (pixels - centre[..., None]).square()


def attention_mask(mask_embeddings: Tensor, features: Tensor) -> Tensor:
    """Return the pixels that each query may attend to, bool [B, 1, Q, T] (equations 2 and 3 of the paper).

    `mask_embeddings` is [B, Q, C]. `features` [B, C, T] are the mask features resized to the levels. Resizing and the
    product with embeddings are both linear, so resizing features gives the same result as resizing logits. A query with
    an empty mask may attend everywhere.
    """
    with torch.autocast(features.device.type, enabled=False):
        allowed = (mask_embeddings.to(features.dtype) @ features) >= 0
    allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
    return allowed[:, None]


@torch.no_grad()
def resize_for_attention(mask_features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize mask features [B, C, H, W] bilinearly to `size` (h, w), in float32 at least.

    Return [B, C, h * w].
    """
    features = to_at_least_float32(mask_features)
    return F.interpolate(features, tuple(size), mode="bilinear", align_corners=False).flatten(2)
