"""The whole model: backbone, pixel decoder and transformer decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from m2f.model.backbones.build import build_backbone
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    ModelPart,
    StandardTransformerDecoderConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.pixel_decoder import build_pixel_decoder
from m2f.model.structures import Predictions
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder
from m2f.model.transformer_decoder.standard import StandardTransformerDecoder


class Mask2Former(nn.Module):
    """Masked-attention mask transformer (Cheng et al., CVPR 2022), or MaskFormer with the decoder `standard`."""

    pixel_decoder_fp32: bool
    """Whether autocast stops at the pixel decoder, whose weights are then in fp32."""

    def __init__(self, config: ModelConfig, backbone: nn.Module, channels: tuple[int, ...], num_classes: int) -> None:
        """`channels` of the backbone's maps at strides 4, 8, 16, 32; `num_classes` without "no object"."""
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = build_pixel_decoder(config.pixel_decoder, channels)
        decoder, feature_dim = config.transformer_decoder, self.pixel_decoder.feature_dim
        dims = self.pixel_decoder.mask_dim, num_classes
        self.decodes_backbone = False
        match decoder:
            case MaskedTransformerDecoderConfig():
                self.transformer_decoder = MaskedTransformerDecoder(decoder, feature_dim, *dims)
            case StandardTransformerDecoderConfig():
                # MaskFormer takes the backbone's last map, unless a transformer encoder has refined it.
                self.decodes_backbone = not isinstance(config.pixel_decoder, TransformerFPNPixelDecoderConfig)
                source_dim = channels[-1] if self.decodes_backbone else feature_dim
                self.transformer_decoder = StandardTransformerDecoder(decoder, source_dim, *dims)
            case _:
                assert_never(decoder)
        self.pixel_decoder_fp32 = False
        self._frozen: tuple[ModelPart, ...] = ()
        # Numbers and not buffers: a model cast to bfloat16 must not round them.
        self.pixel_mean, self.pixel_std = config.pixel_mean, config.pixel_std

    def forward(self, images: Tensor) -> Predictions:
        """`images` [B, 3, H, W] as `normalise` returns them."""
        maps = self.backbone(images)
        mask_features, features = self._decode_pixels(maps)
        return self.transformer_decoder(maps[-1:] if self.decodes_backbone else features, mask_features)

    def freeze(self, parts: Sequence[ModelPart]) -> None:
        """Let no training change these parts: weights take no gradients, norms and dropouts stay in evaluation mode."""
        self._frozen = tuple(parts)
        for part in parts:
            self.get_submodule(part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Mask2Former:
        """As in torch, but for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            self.get_submodule(part).eval()
        return self

    def _decode_pixels(self, maps: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.pixel_decoder_fp32:
            return self.pixel_decoder(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            return self.pixel_decoder([feature.float() for feature in maps])

    @torch.no_grad()
    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """RGB `images` [B, 3, H, W] in 0..255 to float32 of zero mean and unit variance, on the device of the images.

        Pixels outside each image's (height, width) in `sizes` [B, 2] become 0, as if they were padded afterwards.
        The result is channels-last in memory, and so are then all maps of a convolutional backbone; on a CPU it is
        contiguous, because repacking the kernels for every image would cost more than the format gains.
        """
        # Filled on the device: a copy from the host would wait for all work queued before it.
        mean, std = (
            torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=images.device) for value in values])
            for values in (self.pixel_mean, self.pixel_std)
        )
        normalised = (images.to(torch.float32) - mean) / std
        if sizes is not None:
            normalised = zero_outside(normalised, sizes.to(images.device))
        is_cpu = images.device.type == "cpu"
        return normalised.contiguous(memory_format=torch.contiguous_format if is_cpu else torch.channels_last)


def zero_outside(images: Tensor, sizes: Tensor) -> Tensor:
    """`images` [B, C, H, W] with zeros below and to the right of each (height, width) in `sizes` [B, 2]."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, images, 0.0)  # keeps the memory format, which masked_fill does not


def build_model(config: ModelConfig, *, pretrained_backbone: bool = True) -> Mask2Former:
    """Build the model of a recipe; `config.weights` is left to `m2f.model.weights.load.load_weights`.

    With `pretrained_backbone=False` the backbone's own weights are neither fetched nor read: for a model that gets a
    checkpoint next. Raises ConfigError where the recipe cannot work.
    """
    if config.num_classes is None:
        raise ConfigError("model.num_classes is not known; set it from the category table of the data set")
    backbone = build_backbone(config.backbone, pretrained=pretrained_backbone)
    model = Mask2Former(config, backbone, backbone.channels, config.num_classes)
    model.freeze(config.freeze)
    return model
