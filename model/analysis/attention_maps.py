"""Cross-attention weights of a decoder's queries, and their share on objects.

They reproduce the paper's Figure I (maps) and Table I b (attention on foreground and background). Fused attention does
not return its weights, so they are recomputed from the inputs of each layer's cross-attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.attention import MaskPooling, ProjectedAttention, split_heads
from m2f.model.errors import ConfigError
from m2f.model.segmenter import Segmenter
from m2f.model.transformer_decoder.masked import DecoderLayer, MaskedTransformerDecoder
from m2f.model.transformer_decoder.standard import StandardTransformerDecoder


@dataclass(frozen=True)
class AttentionMap:
    """Cross-attention weights of one layer."""

    layer: int
    """Decoder layer, from 1. With supervised queries, the layer's output queries make prediction `layer`."""
    strides: tuple[int, ...]
    """Strides of the layer's feature levels, in the order of the pixels."""
    shapes: tuple[tuple[int, int], ...]
    """(height, width) of these levels."""
    weights: Tensor
    """[B, Q, T] float32, mean over heads; every row sums to 1 over the T pixels of all levels."""

    @property
    def level_name(self) -> str:
        """Return the name of the levels, such as `1/8`, or `1/32 + 1/16 + 1/8` for a layer with all three."""
        return " + ".join(f"1/{stride}" for stride in self.strides)

    def level_maps(self, image: int, query: int) -> tuple[Tensor, ...]:
        """Return one map [height, width] of weights per level."""
        parts = self.weights[image, query].split([height * width for height, width in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))


@contextmanager
def recorded_attention(model: Segmenter) -> Iterator[list[AttentionMap]]:
    """Context manager that yields a list. Every forward pass inside it appends the maps of all layers.

    Raises ConfigError for a model whose queries have no separate cross-attention.
    """
    decoder = model.transformer_decoder
    if not isinstance(decoder, MaskedTransformerDecoder | StandardTransformerDecoder):
        raise ConfigError(
            "attention maps need cross-attention, which this model.transformer_decoder.kind does not have; use kind "
            "masked or standard"
        )
    groups = decoder.groups if isinstance(decoder, MaskedTransformerDecoder) else ((0,),)
    maps: list[AttentionMap] = []
    sizes: list[tuple[int, int]] = []

    def record_sizes(_: nn.Module, inputs: tuple[Sequence[Tensor], Tensor]) -> None:
        sizes[:] = [(feature.shape[-2], feature.shape[-1]) for feature in inputs[0]]

    def record_weights(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        group = groups[index % len(groups)]
        strides, shapes = tuple(32 >> level for level in group), tuple(sizes[level] for level in group)
        maps.append(AttentionMap(index + 1, strides, shapes, attention_weights(module, *inputs)))

    with ExitStack() as hooks:
        handles = [decoder.register_forward_pre_hook(record_sizes)]
        handles += [
            cast("DecoderLayer", layer).cross.register_forward_pre_hook(partial(record_weights, index))
            for index, layer in enumerate(decoder.layers)
        ]
        for handle in handles:
            hooks.callback(handle.remove)
        yield maps


@torch.no_grad()
def attention_weights(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the weights [B, Q, T] of a `ProjectedAttention` or `MaskPooling` for its inputs.

    They are float32 and averaged over heads.
    """
    if isinstance(module, MaskPooling):
        _, mask = inputs
        inside = mask[:, 0].float()
        return inside / inside.sum(-1, keepdim=True)
    assert isinstance(module, ProjectedAttention)
    query, key, _, *mask = inputs
    query, key = (split_heads(tokens.float(), module.heads) for tokens in (query, key))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    for guide in mask:
        if guide is not None:
            logits = logits.masked_fill(~guide, -torch.inf) if guide.dtype == torch.bool else logits + guide.float()
    return logits.softmax(-1).mean(1)


def foreground_mass(weights: Tensor, shapes: Sequence[tuple[int, int]], masks: Tensor) -> Tensor:
    """Return the share [N] of attention on an object (Table I b).

    `weights` [N, T] sum to 1 over the pixels of the levels `shapes`; `masks` [N, H, W] bool cover the whole input. A
    pixel of a level counts as foreground in proportion to the area that the mask covers.
    """
    masks = masks.float()[:, None]
    cover = torch.cat([F.adaptive_avg_pool2d(masks, shape).flatten(1) for shape in shapes], dim=1)
    return (weights * cover).sum(-1)
