"""Transformer decoder with masked attention (Mask2Former, sections 3.2 and 3.2.2).

Axis letters: L predictions, B images, Q queries, K classes, C channels, h x w pixels of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TransformerDecoderConfig
from model.errors import ConfigError
from model.pixel_decoder import convolution
from model.position_encoding import sine_position_embedding
from model.structures import Predictions

NUM_LEVELS = 3
"""Feature levels 1/32, 1/16 and 1/8, visited in turn."""


def attention_mask(mask_embeddings: Tensor, features: Tensor) -> Tensor:
    """Pixels that each query may attend to: bool [B, 1, Q, h * w] (equation 2 and 3 of the paper).

    `mask_embeddings` [B, Q, C] and `features` [B, C, h * w], the mask features resized to the level. Resizing features
    equals resizing the logits, because both are linear. A query whose mask is empty may attend everywhere.
    """
    with torch.autocast(features.device.type, enabled=False):
        allowed = (mask_embeddings.to(features.dtype) @ features) >= 0
    allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
    return allowed[:, None]


def packed_xavier_(linear: nn.Linear) -> None:
    """Initialise a part of an attention's packed [3 C, C] input projection: xavier bound of the whole, zero bias."""
    bound = (6 / (4 * linear.in_features)) ** 0.5
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, T, C] to [B, heads, T, C / heads] without a copy."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attend(nn.Module):
    """Attention over projected queries, keys and values, then output projection, residual and LayerNorm."""

    def __init__(self, config: TransformerDecoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.dropout
        self.output = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, residual: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`query` [B, Q, C], `key` and `value` [B, T, C], `mask` [B, 1, Q, T] True where allowed: [B, Q, C]."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = (split_heads(tokens, self.heads) for tokens in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        projected = self.output(attended.transpose(1, 2).flatten(2))
        return self.norm(residual + F.dropout(projected, dropout, self.training))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and a feed-forward network, each with LayerNorm after its residual."""

    def __init__(self, config: TransformerDecoderConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.cross_query = nn.Linear(dim, dim)
        self.cross = Attend(config)
        self.self_query_key = nn.Linear(dim, 2 * dim)
        self.self_value = nn.Linear(dim, dim)
        self.self_attention = Attend(config)
        self.linear1 = nn.Linear(dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        for projection in (self.cross_query, self.self_query_key, self.self_value):
            packed_xavier_(projection)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor, position: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """`queries` and their embedding `position` [B, Q, C]; projected `key` and `value` [B, h * w, C]: [B, Q, C]."""
        queries = self.cross(queries, self.cross_query(queries + position), key, value, mask)
        query, own_key = self.self_query_key(queries + position).chunk(2, dim=-1)
        queries = self.self_attention(queries, query, own_key, self.self_value(queries))
        expanded = self.linear2(self.dropout(self.linear1(queries).relu()))
        return self.norm(queries + self.dropout(expanded))


class LevelMemory(nn.Module):
    """Keys and values of one feature level for all decoder layers that attend to it, in one product each.

    They do not depend on the queries, so a layer's projections are rows of these two larger ones.
    """

    def __init__(self, in_dim: int, config: TransformerDecoderConfig, layers: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.layers = layers
        self.input_proj = nn.Identity() if in_dim == dim else convolution(in_dim, dim, 1)
        self.key = nn.Linear(dim, layers * dim)
        self.value = nn.Linear(dim, layers * dim)
        for projection in (self.key, self.value):
            packed_xavier_(projection)

    def forward(self, feature: Tensor, level_embedding: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`feature` [B, C', h, w] to one key and one value [B, h * w, C] per layer."""
        height, width = feature.shape[-2:]
        tokens = self.input_proj(feature).flatten(2).transpose(1, 2) + level_embedding
        position = sine_position_embedding(height, width, tokens.shape[-1], tokens.device).flatten(0, 1)
        keys = self.key(tokens + position.to(tokens.dtype))
        return keys.chunk(self.layers, dim=-1), self.value(tokens).chunk(self.layers, dim=-1)


class MaskedTransformerDecoder(nn.Module):
    """Learnable queries refined by masked attention; every layer's queries are supervised."""

    def __init__(self, config: TransformerDecoderConfig, in_dim: int, mask_dim: int, num_classes: int) -> None:
        """`in_dim` channels of the multi-scale features, `mask_dim` channels of the mask features."""
        super().__init__()
        dim = config.hidden_dim
        if dim % 4:
            raise ConfigError(f"model.transformer_decoder.hidden_dim is {dim}; 4 must divide it")
        self.query_feat = nn.Embedding(config.num_queries, dim)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, dim)
        layers_of_level = [len(range(level, config.num_layers, NUM_LEVELS)) for level in range(NUM_LEVELS)]
        self.memories = nn.ModuleList(LevelMemory(in_dim, config, count) for count in layers_of_level if count)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim)
        )

    def forward(self, features: Sequence[Tensor], mask_features: Tensor) -> Predictions:
        """`features` [B, C', h, w] in the order 1/32, 1/16, 1/8 and `mask_features` [B, mask_dim, h, w]."""
        device = mask_features.device
        embeddings = self.level_embed(torch.arange(NUM_LEVELS, device=device))
        memories = [memory(f, e) for memory, f, e in zip(self.memories, features, embeddings, strict=False)]
        resized = [resize_for_attention(mask_features, feature.shape[-2:]) for feature in features[: len(memories)]]
        indices = torch.arange(self.query_feat.num_embeddings, device=device)
        queries = self.query_feat(indices).expand(len(mask_features), -1, -1)
        position = self.query_embed(indices).expand(len(mask_features), -1, -1)
        states = [queries]
        for index, layer in enumerate(self.layers):
            slot, level = divmod(index, NUM_LEVELS)
            keys, values = memories[level]
            with torch.no_grad():
                mask = attention_mask(self.mask_embed(self.norm(queries)), resized[level])
            queries = layer(queries, position, keys[slot], values[slot], mask)
            states.append(queries)
        # All predictions in one call; the masks above need the same embeddings earlier, but without gradient.
        normalised = self.norm(torch.stack(states))
        return Predictions(self.class_embed(normalised), self.mask_embed(normalised), mask_features)


@torch.no_grad()
def resize_for_attention(mask_features: Tensor, size: Sequence[int]) -> Tensor:
    """Mask features bilinearly resized to a level, in float32 at least: [B, C, h * w]."""
    features = mask_features.to(torch.promote_types(mask_features.dtype, torch.float32))
    return F.interpolate(features, tuple(size), mode="bilinear", align_corners=False).flatten(2)
