"""MaskFormer's transformer decoder (Cheng et al., NeurIPS 2021), the baseline of Tables XIc and XId."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2f.model.config import MaskedTransformerDecoderConfig, StandardTransformerDecoderConfig
from m2f.model.layers import Table
from m2f.model.structures import Predictions
from m2f.model.transformer_decoder.masked import DecoderLayer, LevelMemory, mask_head


class StandardTransformerDecoder(nn.Module):
    """DETR's decoder on one map, with zero queries and learned positions.

    Self-attention precedes cross-attention to all pixels. Every layer is supervised (deep supervision) through one
    shared LayerNorm and shared heads.
    """

    def __init__(self, config: StandardTransformerDecoderConfig, in_dim: int, mask_dim: int, num_classes: int) -> None:
        """Build the decoder.

        `in_dim` is the number of channels of the map at stride 32, `mask_dim` that of the mask features.
        """
        super().__init__()
        dim = config.hidden_dim
        layer = MaskedTransformerDecoderConfig(
            hidden_dim=dim,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
            attention="cross",
            cross_attention_first=False,
        )
        self.query_embed = Table(config.num_queries, dim)
        self.memory = LevelMemory(in_dim, layer, config.num_layers)
        self.layers = nn.ModuleList(DecoderLayer(layer) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = mask_head(dim, mask_dim)

    def forward(self, features: Sequence[Tensor], mask_features: Tensor) -> Predictions:
        """Return the predictions of all layers; there is none before the first layer.

        Only the first of `features` is used: the map [B, in_dim, h, w] at stride 32. `mask_features` is
        [B, mask_dim, h, w].
        """
        memory = self.memory(features[:1], (0.0,))
        position = self.query_embed().expand(mask_features.shape[0], -1, -1)
        queries, states = torch.zeros_like(position), []
        for layer, keys_and_values in zip(self.layers, memory, strict=True):
            queries = layer(queries, position, keys_and_values, None)
            states.append(queries)
        normalised = self.norm(torch.stack(states))
        return Predictions(self.class_embed(normalised), self.mask_embed(normalised), mask_features)
