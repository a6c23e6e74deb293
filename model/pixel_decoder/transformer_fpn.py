"""Transformer encoder over the coarsest map, then an FPN (MaskFormer: Cheng et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from m2f.model.attention import ProjectedAttention, packed_xavier_
from m2f.model.config import TransformerFPNPixelDecoderConfig
from m2f.model.layers import PixelDecoder, convolution, relu_of_new, run_layer
from m2f.model.pixel_decoder.fpn import FeaturePyramid
from m2f.model.position_encoding import sine_position_embedding


class EncoderLayer(nn.Module):
    """DETR's encoder layer: self-attention and a feed-forward network.

    Each is followed by a residual connection and LayerNorm.
    """

    def __init__(self, config: TransformerFPNPixelDecoderConfig) -> None:
        super().__init__()
        dim = config.conv_dim
        self.query_key = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim)
        self.attention = ProjectedAttention(dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        for projection in (self.query_key, self.value):
            packed_xavier_(projection)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, source: Tensor, position: Tensor) -> Tensor:
        """Update the S pixels `source` [B, S, C] of a map; `position` [S, C] is added to queries and keys."""
        query, key = self.query_key(source + position).chunk(2, dim=-1)
        source = self.attention.norm(source + self.attention(query, key, self.value(source)))
        expanded = self.linear2(self.dropout(relu_of_new(self.linear1(source))))
        return self.norm(source + self.dropout(expanded))


class TransformerFPNPixelDecoder(PixelDecoder):
    """FPN over the finer maps and a transformer-encoded coarsest map.

    The returned map at 1/32 is the encoder's output, before the pyramid smooths it, because MaskFormer's transformer
    decoder attends to that map.
    """

    def __init__(self, config: TransformerFPNPixelDecoderConfig, channels: Sequence[int]) -> None:
        """Build the decoder for a backbone with `channels` at strides 4, 8, 16, 32."""
        super().__init__(config.conv_dim, config.mask_dim)
        dim = config.conv_dim
        *others, coarsest = channels
        self.checkpointing = config.checkpointing
        self.input_proj = convolution(coarsest, dim, 1)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.fpn = FeaturePyramid((*others, dim), dim)
        self.mask_features = convolution(dim, config.mask_dim, 3)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return mask features and multi-scale maps; see PixelDecoder."""
        *others, coarsest = features
        encoded = self._encode(self.input_proj(coarsest))
        _, stride16, stride8, stride4 = self.fpn((*others, encoded))
        return self.mask_features(stride4), (encoded, stride16, stride8)

    def _encode(self, feature: Tensor) -> Tensor:
        height, width = feature.shape[-2:]
        # The residual stream keeps the norms' dtype: float32 under autocast, also if linear layers were cast before.
        first = self.layers[0]
        assert isinstance(first, EncoderLayer)
        tokens = feature.flatten(2).transpose(1, 2).to(first.norm.weight.dtype)
        position = sine_position_embedding(height, width, self.feature_dim, feature.device).flatten(0, 1)
        for layer in self.layers:
            tokens = run_layer(layer, self.checkpointing, tokens, position.to(tokens.dtype))
        return tokens.transpose(1, 2).unflatten(2, (height, width))
