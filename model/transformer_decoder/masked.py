"""Transformer decoder with masked attention (Mask2Former, sections 3.2 and 3.2.2) and its ablated variants.

Axis letters: L predictions, B images, Q queries, K classes, C channels, h x w pixels of a level, T pixels of the levels
that a layer attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m2f.model.attention import (
    MaskPooling,
    ProjectedAttention,
    SpatialPrior,
    attention_mask,
    packed_xavier_,
    resize_for_attention,
    to_at_least_float32,
)
from m2f.model.config import MaskedTransformerDecoderConfig
from m2f.model.layers import Table, relu_of_new
from m2f.model.pilots import PilotGuides
from m2f.model.pixel_decoder import convolution
from m2f.model.position_encoding import sine_position_embedding
from m2f.model.structures import Predictions

_LEVEL_GROUPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "multi_scale": ((0,), (1,), (2,)),
    "naive_multi_scale": ((0, 1, 2),),
    "stride_32": ((0,),),
    "stride_16": ((1,),),
    "stride_8": ((2,),),
}
"""Groups of the levels 1/32, 1/16 and 1/8 for each setting of `features`. Layers attend to them in turn (Table 4d)."""

AttentionGuide = Callable[[int, Tensor], Tensor | None]
"""Returns the attention mask or the added logits of a layer, or None, given its index and its input queries."""


class DecoderLayer(nn.Module):
    """Cross-attention (or mask pooling), self-attention and a feed-forward network.

    Each has a residual connection and LayerNorm. By default, as in the published code, cross-attention precedes
    self-attention, and LayerNorm follows the residual addition. Settings can reverse both orders.
    """

    def __init__(self, config: MaskedTransformerDecoderConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.cross_first, self.pre_norm = config.cross_attention_first, config.pre_norm
        self.pools = config.attention == "mask_pooling"
        if self.pools:
            self.cross = MaskPooling(dim, config.dropout)
        else:
            self.cross_query = nn.Linear(dim, dim)
            self.cross = ProjectedAttention(dim, config.num_heads, config.dropout)
        self.self_query_key = nn.Linear(dim, 2 * dim)
        self.self_value = nn.Linear(dim, dim)
        self.self_attention = ProjectedAttention(dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        projections = [] if self.pools else [self.cross_query]
        for projection in (*projections, self.self_query_key, self.self_value):
            packed_xavier_(projection)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        memory: tuple[Tensor, ...],
        attn_mask: Tensor | None,
        self_mask: Tensor | None = None,
    ) -> Tensor:
        """Update the queries [B, Q, C].

        Args:
            queries: [B, Q, C] features of the queries.
            position: [B, Q, C] positional embedding of the queries.
            memory: keys and values of this layer, or its tokens, as `LevelMemory` returns them.
            attn_mask: attention mask, or logits to add. None allows attention to all pixels.
            self_mask: [B, 1, Q, Q] bool, True if a query (row) may attend to another one (column).
        """

        def cross(source: Tensor) -> Tensor:
            if self.pools:
                return self.cross(*memory, attn_mask)
            return self.cross(self.cross_query(source + position), *memory, attn_mask)

        def self_attention(source: Tensor) -> Tensor:
            query, key = self.self_query_key(source + position).chunk(2, dim=-1)
            return self.self_attention(query, key, self.self_value(source), self_mask)

        def feed_forward(source: Tensor) -> Tensor:
            return self.dropout(self.linear2(self.dropout(relu_of_new(self.linear1(source)))))

        attentions = [(cross, self.cross.norm), (self_attention, self.self_attention.norm)]
        for block, norm in attentions if self.cross_first else reversed(attentions):
            queries = self._residual(block, norm, queries)
        return self._residual(feed_forward, self.norm, queries)

    def _residual(self, block: Callable[[Tensor], Tensor], norm: nn.Module, queries: Tensor) -> Tensor:
        return queries + block(norm(queries)) if self.pre_norm else norm(queries + block(queries))


class LevelMemory(nn.Module):
    """Keys and values of one group of feature levels, for all decoder layers that attend to it.

    They do not depend on the queries. One matrix product therefore computes the keys of all layers, and another one the
    values. Mask pooling has no keys and values: its layers share the tokens.
    """

    def __init__(self, in_dim: int, config: MaskedTransformerDecoderConfig, layers: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.layers = layers
        self.input_proj = nn.Identity() if in_dim == dim else convolution(in_dim, dim, 1)
        self.pools = config.attention == "mask_pooling"
        if not self.pools:
            self.key = nn.Linear(dim, layers * dim)
            self.value = nn.Linear(dim, layers * dim)
            for projection in (self.key, self.value):
                packed_xavier_(projection)

    def forward(
        self, features: Sequence[Tensor], level_embeddings: Sequence[Tensor | float]
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Return (key, value) of every layer, or (tokens,) of every layer for mask pooling.

        `features` are the maps [B, C', h, w] of the group's levels. Keys, values and tokens are [B, T, C]. Level
        embeddings are added to all three, positional embeddings to keys only.
        """
        maps = [self.input_proj(feature) for feature in features]
        pairs = zip(maps, level_embeddings, strict=True)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) + embedding for level, embedding in pairs], dim=1)
        if self.pools:
            return ((tokens,),) * self.layers
        position = torch.cat(
            [
                sine_position_embedding(level.shape[-2], level.shape[-1], tokens.shape[-1], tokens.device).flatten(0, 1)
                for level in maps
            ]
        )
        keys = self.key(tokens + position.to(tokens.dtype))
        return tuple(zip(keys.chunk(self.layers, -1), self.value(tokens).chunk(self.layers, -1), strict=True))


def mask_head(dim: int, mask_dim: int) -> nn.Sequential:
    """Return the MLP from queries to mask embeddings, whose products with the mask features are mask logits."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim))


class MaskedTransformerDecoder(nn.Module):
    """Decoder that refines queries layer by layer by attending to the image.

    The queries after every layer are supervised.
    """

    def __init__(self, config: MaskedTransformerDecoderConfig, in_dim: int, mask_dim: int, num_classes: int) -> None:
        """Build the decoder.

        `in_dim` is the number of channels of the multi-scale features, `mask_dim` that of the mask features.
        """
        super().__init__()
        dim = config.hidden_dim
        self.attention = config.attention
        self.supervised = config.queries == "supervised"
        groups = _LEVEL_GROUPS[config.features]
        self.levels = [level for group in groups for level in group]
        self.groups = groups[: config.num_layers]
        self.zero_initialised = config.queries == "zero"
        if not self.zero_initialised:
            self.query_feat = Table(config.num_queries, dim)
        self.query_embed = Table(config.num_queries, dim)
        self.level_embed = Table(len(self.levels), dim)
        layers_of_group = [len(range(first, config.num_layers, len(groups))) for first in range(len(self.groups))]
        self.memories = nn.ModuleList(LevelMemory(in_dim, config, count) for count in layers_of_group)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        if config.attention == "smca":
            self.reference = nn.Sequential(nn.LayerNorm(dim), *mask_head(dim, 2), nn.Sigmoid())
            self.priors = nn.ModuleList(SpatialPrior(dim, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = mask_head(dim, mask_dim)

    def forward(
        self, features: Sequence[Tensor], mask_features: Tensor, pilots: PilotGuides | None = None
    ) -> Predictions:
        """Return predictions, with those of pilots before those of the queries.

        `features` are [B, C', h, w] in the order 1/32, 1/16, 1/8; `mask_features` is [B, mask_dim, h, w].
        """
        embeddings = dict(zip(self.levels, self.level_embed(), strict=True))
        memories = [
            memory([features[level] for level in group], [embeddings[level] for level in group])
            for memory, group in zip(self.memories, self.groups, strict=True)
        ]
        queries, position = self._initial_queries(mask_features.shape[0])
        attn_mask = self._attention_masks(features, mask_features, queries, position)
        self_mask = None
        if pilots is not None:
            attn_mask = self._with_pilots(attn_mask, pilots)
            self_mask = pilots.self_attention_mask(queries.shape[1])
            queries = torch.cat((pilots.content.to(queries.dtype), queries), dim=1)
            position = torch.cat((torch.zeros_like(pilots.content, dtype=position.dtype), position), dim=1)
        states = [queries] if self.supervised else []
        for index, layer in enumerate(self.layers):
            slot, group = divmod(index, len(self.groups))
            queries = layer(queries, position, memories[group][slot], attn_mask(index, queries), self_mask)
            states.append(queries)
        # One call computes all predictions. The masks above also need the embeddings, but earlier, without gradients.
        normalised = self.norm(torch.stack(states))
        return Predictions(self.class_embed(normalised), self.mask_embed(normalised), mask_features)

    def _with_pilots(self, own: AttentionGuide, pilots: PilotGuides) -> AttentionGuide:
        """Return a guide that puts the masks of pilots before those of the other queries."""

        def mask(index: int, queries: Tensor) -> Tensor:
            predicted = own(index, queries[:, pilots.content.shape[1] :])
            assert predicted is not None  # ModelConfig rejects pilots for other kinds of attention
            return torch.cat((pilots.attention_mask(index, self.groups[index % len(self.groups)]), predicted), dim=2)

        return mask

    def _initial_queries(self, images: int) -> tuple[Tensor, Tensor]:
        """Return the features and the positional embeddings of the initial queries, [B, Q, C] each."""
        position = self.query_embed().expand(images, -1, -1)
        if self.zero_initialised:
            return torch.zeros_like(position), position
        return self.query_feat().expand(images, -1, -1), position

    def _attention_masks(
        self, features: Sequence[Tensor], mask_features: Tensor, queries: Tensor, position: Tensor
    ) -> AttentionGuide:
        """Return a function from a layer's index and input queries to its attention mask or added logits.

        The first layer's mask comes from the initial queries, even if these are not supervised (equation 3). Initial
        queries of zeros all have the same mask.
        """
        sizes = [feature.shape[-2:] for feature in features]
        groups = self.groups
        if self.attention == "cross":
            return lambda index, queries: None
        if self.attention == "smca":
            reference = self.reference(queries + position)
            attended_sizes = [[sizes[0], *(sizes[level] for level in group)] for group in groups]
            return lambda index, queries: self.priors[index](
                queries + position, reference, attended_sizes[index % len(groups)]
            )
        converted = to_at_least_float32(mask_features.detach())  # once for all levels, because it is a large tensor
        resized = [
            torch.cat([resize_for_attention(converted, sizes[level]) for level in group], dim=-1) for group in groups
        ]

        @torch.no_grad()
        def mask(index: int, queries: Tensor) -> Tensor:
            return attention_mask(self.mask_embed(self.norm(queries)), resized[index % len(groups)])

        return mask
