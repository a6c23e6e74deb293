"""Mask2Former and MaskFormer, and `build_model`, which builds the model of any recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from m2f.model.backbones.build import build_backbone
from m2f.model.backbones.plain_vit import PlainVit
from m2f.model.config import (
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    PmtDecoderConfig,
    StandardTransformerDecoderConfig,
    TransformerFPNPixelDecoderConfig,
    UpscalePixelDecoderConfig,
)
from m2f.model.eomt.eomt import Eomt
from m2f.model.errors import ConfigError
from m2f.model.pixel_decoder import build_pixel_decoder
from m2f.model.pmt.pmt import Pmt
from m2f.model.segmenter import Segmenter, TrainingContext
from m2f.model.structures import Predictions
from m2f.model.transformer_decoder.masked import MaskedTransformerDecoder
from m2f.model.transformer_decoder.standard import StandardTransformerDecoder


class Mask2Former(Segmenter):
    """Masked-attention mask transformer (Cheng et al., CVPR 2022), or MaskFormer if the decoder is `standard`."""

    def __init__(self, config: ModelConfig, backbone: nn.Module, channels: tuple[int, ...], num_classes: int) -> None:
        """Build the decoders for a backbone.

        `channels` are those of the backbone's maps at strides 4, 8, 16, 32. `num_classes` excludes "no object".
        """
        super().__init__(config)
        self.backbone = backbone
        # ModelConfig accepts these parts only with a plain vision transformer.
        assert not isinstance(config.pixel_decoder, UpscalePixelDecoderConfig)
        assert not isinstance(config.transformer_decoder, EomtDecoderConfig | PmtDecoderConfig)
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

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """Return predictions; see Segmenter."""
        maps = self.backbone(images)
        mask_features, features = self._decode_pixels(maps)
        if context is not None and context.pilots is not None:
            guides = context.pilots.at([feature.shape[-2:] for feature in features])
            return self.transformer_decoder(features, mask_features, guides)
        return self.transformer_decoder(maps[-1:] if self.decodes_backbone else features, mask_features)

    def _decode_pixels(self, maps: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.pixel_decoder_fp32:
            return self.pixel_decoder(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            return self.pixel_decoder([feature.float() for feature in maps])


def build_model(config: ModelConfig, *, pretrained_backbone: bool = True) -> Segmenter:
    """Build the model of a recipe. This does not load `config.weights`; `m2f.model.weights.load.load_weights` does.

    With `pretrained_backbone=False` the backbone's own weights are neither downloaded nor read. Use this for a model
    that will load a checkpoint. Raises ConfigError if the recipe cannot work.
    """
    if config.num_classes is None:
        raise ConfigError("model.num_classes is not set; take it from the category table of the data set")
    backbone = build_backbone(config.backbone, pretrained=pretrained_backbone)
    model: Segmenter
    match backbone:
        case PlainVit() if isinstance(config.transformer_decoder, PmtDecoderConfig):
            model = Pmt(config, backbone, config.num_classes)
        case PlainVit():
            model = Eomt(config, backbone, config.num_classes)
        case _:
            model = Mask2Former(config, backbone, backbone.channels, config.num_classes)
    model.freeze(config.freeze)
    return model
