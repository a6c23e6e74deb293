"""Multiply-adds of the transformer decoders, with the operations of the official code.

Our decoders save some of them: attention masks come from resized features, and intermediate layers never compute dense
masks. `m2f.model.analysis.flops.executed` counts our decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from m2f.model.analysis.flops.operations import BILINEAR, NORM, MapSize, attention, convolution, feed_forward
from m2f.model.config import MaskedTransformerDecoderConfig, StandardTransformerDecoderConfig


def masked(
    config: MaskedTransformerDecoderConfig, in_dim: int, mask_dim: int, num_classes: int, maps: Sequence[MapSize]
) -> int:
    """Return the cost of the paper's decoder or one of its ablations.

    `maps` are at strides 4, 8, 16, 32; `in_dim` is the number of channels of the features.
    """
    queries, dim, mask_pixels = config.num_queries, config.hidden_dim, maps[0].pixels
    tokens_of_layers = _tokens_of_groups(config, [level.pixels for level in maps[1:]])
    total = 0
    if in_dim != dim:
        total += convolution(sum(tokens_of_layers), in_dim, dim)
    for index in range(config.num_layers):
        tokens = tokens_of_layers[index % len(tokens_of_layers)]
        if config.attention in ("masked", "mask_pooling"):
            total += queries * mask_dim * mask_pixels + BILINEAR * queries * tokens
        total += _cross_attention(config, tokens)
        total += 4 * convolution(queries, dim, dim) + attention(queries, queries, dim)
        total += feed_forward(queries, dim, config.feedforward_dim) + 3 * NORM * queries * dim
    if config.attention == "smca":  # reference points of the queries
        total += NORM * queries * dim + 2 * convolution(queries, dim, dim) + convolution(queries, dim, 2)
    heads = _prediction_heads(queries, dim, mask_dim, num_classes)
    return total + (config.num_layers + 1) * heads + queries * mask_dim * mask_pixels


def standard(
    config: StandardTransformerDecoderConfig, in_dim: int, mask_dim: int, num_classes: int, maps: Sequence[MapSize]
) -> int:
    """Return the cost of MaskFormer's decoder on a map of stride 32 with `in_dim` channels.

    MaskFormer's code computes the masks of all layers.
    """
    queries, dim, tokens = config.num_queries, config.hidden_dim, maps[-1].pixels
    layer = 2 * convolution(queries + tokens, dim, dim) + attention(queries, tokens, dim)
    layer += 4 * convolution(queries, dim, dim) + attention(queries, queries, dim)
    layer += feed_forward(queries, dim, config.feedforward_dim) + 3 * NORM * queries * dim
    layer += _prediction_heads(queries, dim, mask_dim, num_classes) + queries * mask_dim * maps[0].pixels
    projection = 0 if in_dim == dim else convolution(tokens, in_dim, dim)
    return projection + config.num_layers * layer


def _prediction_heads(queries: int, dim: int, mask_dim: int, num_classes: int) -> int:
    """Return the cost of norm, classes and mask embeddings of one layer, without dense masks."""
    mask_embedding = 2 * convolution(queries, dim, dim) + convolution(queries, dim, mask_dim)
    return NORM * queries * dim + convolution(queries, dim, num_classes + 1) + mask_embedding


def _tokens_of_groups(config: MaskedTransformerDecoderConfig, pixels: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of tokens that the layers attend to in turn, from the pixels at strides 8, 16 and 32."""
    stride8, stride16, stride32 = pixels
    match config.features:
        case "multi_scale":
            return stride32, stride16, stride8
        case "naive_multi_scale":
            return (stride32 + stride16 + stride8,)
        case "stride_32":
            return (stride32,)
        case "stride_16":
            return (stride16,)
        case "stride_8":
            return (stride8,)
        case _:
            assert_never(config.features)


def _cross_attention(config: MaskedTransformerDecoderConfig, tokens: int) -> int:
    """Return the cost of one layer's cross-attention or its replacement."""
    queries, dim = config.num_queries, config.hidden_dim
    if config.attention == "mask_pooling":  # a mean of tokens and one projection of it
        return queries * tokens * dim + convolution(queries, dim, dim)
    total = 2 * convolution(queries + tokens, dim, dim) + attention(queries, tokens, dim)
    if config.attention == "smca":  # offset and scale along two axes for every head
        total += NORM * queries * dim + 2 * convolution(queries, dim, 2 * config.num_heads)
    return total
