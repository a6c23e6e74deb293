"""Multiply-adds of the official backbones."""

from __future__ import annotations

from m2f.model.analysis.flops.operations import BATCH_NORM, NORM, MapSize, attention, convolution, feed_forward

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
"""Bottleneck blocks of the stages at strides 4, 8, 16 and 32."""


def resnet(blocks: tuple[int, ...], size: tuple[int, int]) -> int:
    """Return the cost of a ResNet whose bottlenecks have the stride in their 3x3 convolution.

    torchvision and the official configs use this variant.
    """
    map_size = MapSize(*size).strided(2)
    total, channels = _batch_normed(map_size, 3, 64, 7), 64
    map_size = map_size.strided(2)  # max pooling
    for stage, count in enumerate(blocks):
        width, before = 64 * 2**stage, map_size
        map_size = map_size.strided(1 if stage == 0 else 2)
        for block in range(count):
            total += _batch_normed(before if block == 0 else map_size, channels, width)
            total += _batch_normed(map_size, width, width, 3) + _batch_normed(map_size, width, 4 * width)
            if block == 0:
                total += _batch_normed(map_size, channels, 4 * width)
            channels = 4 * width
    return total


def _batch_normed(map_size: MapSize, inputs: int, outputs: int, kernel: int = 1) -> int:
    return convolution(map_size.pixels, inputs, outputs, kernel) + BATCH_NORM * map_size.pixels * outputs


def swin(embed_dim: int, depths: tuple[int, ...], window_size: int, size: tuple[int, int]) -> int:
    """Return the cost of a Swin Transformer with a LayerNorm on every stage's output.

    Maps are padded to whole windows inside each block.
    """
    patch = 4
    map_size = MapSize(*size).strided(patch)
    channels = embed_dim
    total = convolution(map_size.pixels, 3, channels, patch) + NORM * map_size.pixels * channels
    for stage, depth in enumerate(depths):
        if stage > 0:
            map_size = map_size.strided(2)
            total += NORM * map_size.pixels * 4 * channels + convolution(map_size.pixels, 4 * channels, 2 * channels)
            channels *= 2
        total += depth * _swin_block(map_size, channels, window_size) + NORM * map_size.pixels * channels
    return total


def _swin_block(map_size: MapSize, channels: int, window_size: int) -> int:
    padded = map_size.strided(window_size)
    tokens = padded.pixels * window_size**2
    total = convolution(tokens, channels, 4 * channels)  # queries, keys, values and output
    total += attention(tokens, window_size**2, channels)
    return total + feed_forward(map_size.pixels, channels, 4 * channels) + 2 * NORM * map_size.pixels * channels
