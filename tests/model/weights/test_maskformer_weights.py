"""Checkpoints of the official MaskFormer: loaded by their official names, and compared with a plain reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m2f.model.config import (
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    SemanticFPNPixelDecoderConfig,
    StandardTransformerDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import WeightsError
from m2f.model.mask2former import build_model
from m2f.model.position_encoding import sine_position_embedding
from m2f.model.weights.load import load_weights
from m2f.model.weights.names import to_official_names

DIM, MASK_DIM, HEADS, HIDDEN, QUERIES, CLASSES, LAYERS = 64, 32, 4, 48, 5, 3, 2
CHANNELS = (32, 64, 96, 128)
RESNET = TimmBackboneConfig(name="resnet50", options={"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)})
SWIN = SwinBackboneConfig(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=3)
FPN = FPNPixelDecoderConfig(conv_dim=DIM, mask_dim=MASK_DIM)
ENCODED = TransformerFPNPixelDecoderConfig(
    conv_dim=DIM, mask_dim=MASK_DIM, num_layers=LAYERS, num_heads=HEADS, feedforward_dim=HIDDEN
)
STANDARD = StandardTransformerDecoderConfig(
    num_queries=QUERIES, num_layers=LAYERS, hidden_dim=DIM, num_heads=HEADS, feedforward_dim=HIDDEN
)


def maskformer(pixel_decoder, backbone=RESNET, decoder=STANDARD):
    config = ModelConfig(
        backbone=backbone, pixel_decoder=pixel_decoder, transformer_decoder=decoder, num_classes=CLASSES
    )
    return build_model(config).eval()


def attention(name):
    return {
        f"{name}.in_proj_weight": (3 * DIM, DIM),
        f"{name}.in_proj_bias": (3 * DIM,),
        **affine(f"{name}.out_proj", DIM, DIM),
    }


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def convolution_and_norm(name, *shape):
    return {f"{name}.weight": shape, **affine(f"{name}.norm", DIM)}


def feed_forward(name):
    return affine(f"{name}.linear1", HIDDEN, DIM) | affine(f"{name}.linear2", DIM, HIDDEN)


def official_heads(encoded, channels):
    """Return random tensors under the names of the official code."""
    pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    shapes = affine(f"{pixels}.mask_features", MASK_DIM, DIM, 3, 3)
    for level, width in enumerate(channels[:3], start=1):
        shapes |= convolution_and_norm(f"{pixels}.adapter_{level}", DIM, width, 1, 1)
        shapes |= convolution_and_norm(f"{pixels}.layer_{level}", DIM, DIM, 3, 3)
    shapes |= convolution_and_norm(f"{pixels}.layer_4", DIM, DIM if encoded else channels[-1], 3, 3)
    if encoded:
        shapes |= affine(f"{pixels}.input_proj", DIM, channels[-1], 1, 1)
    else:
        shapes |= affine(f"{predictor}.input_proj", DIM, channels[-1], 1, 1)
    for layer in range(LAYERS):
        if encoded:
            name = f"{pixels}.transformer.encoder.layers.{layer}"
            shapes |= attention(f"{name}.self_attn") | feed_forward(name)
            shapes |= affine(f"{name}.norm1", DIM) | affine(f"{name}.norm2", DIM)
        name = f"{predictor}.transformer.decoder.layers.{layer}"
        shapes |= attention(f"{name}.self_attn") | attention(f"{name}.multihead_attn") | feed_forward(name)
        for norm in range(1, 4):
            shapes |= affine(f"{name}.norm{norm}", DIM)
    shapes |= affine(f"{predictor}.transformer.decoder.norm", DIM)
    shapes |= {f"{predictor}.query_embed.weight": (QUERIES, DIM)}
    shapes |= affine(f"{predictor}.class_embed", CLASSES + 1, DIM)
    for index, width in enumerate((DIM, DIM, MASK_DIM)):
        shapes |= affine(f"{predictor}.mask_embed.layers.{index}", width, DIM)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    return state | {"criterion.empty_weight": torch.ones(CLASSES + 1)}


class Reference:
    """Plain reference of MaskFormer's heads that reads weights by their official names."""

    def __init__(self, state):
        self.state = state

    def linear(self, name, tokens):
        return F.linear(tokens, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, tokens):
        return F.layer_norm(tokens, (DIM,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def smooth(self, name, feature, relu=True):
        kernel = self.state[f"{name}.weight"]
        convolved = F.conv2d(feature, kernel, padding=kernel.shape[-1] // 2)
        normalised = F.group_norm(convolved, 32, self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"])
        return normalised.relu() if relu else normalised

    def attend(self, name, query, key, value):
        module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)})
        return module(query, key, value)[0]

    def feed_forward(self, name, tokens):
        return self.linear(f"{name}.linear2", self.linear(f"{name}.linear1", tokens).relu())

    def encode(self, feature):
        name = "sem_seg_head.pixel_decoder.transformer.encoder.layers"
        tokens, position = feature.flatten(2).transpose(1, 2), positions(feature)
        for layer in (f"{name}.{index}" for index in range(LAYERS)):
            placed = tokens + position
            tokens = self.norm(f"{layer}.norm1", tokens + self.attend(f"{layer}.self_attn", placed, placed, tokens))
            tokens = self.norm(f"{layer}.norm2", tokens + self.feed_forward(layer, tokens))
        return tokens.transpose(1, 2).view_as(feature)

    def mask_features(self, maps, coarsest):
        name = "sem_seg_head.pixel_decoder"
        feature = self.smooth(f"{name}.layer_4", coarsest)
        for level in (3, 2, 1):
            fine = self.smooth(f"{name}.adapter_{level}", maps[level - 1], relu=False)
            feature = self.smooth(f"{name}.layer_{level}", fine + F.interpolate(feature, fine.shape[-2:]))
        state = self.state
        return F.conv2d(feature, state[f"{name}.mask_features.weight"], state[f"{name}.mask_features.bias"], padding=1)

    def predict(self, maps):
        pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
        source = maps[-1]
        for name in (f"{pixels}.input_proj", f"{predictor}.input_proj"):
            if f"{name}.weight" in self.state:
                source = F.conv2d(source, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        encoded = f"{pixels}.input_proj.weight" in self.state
        source = self.encode(source) if encoded else source
        mask_features = self.mask_features(maps, source if encoded else maps[-1])
        memory = source.flatten(2).transpose(1, 2)
        keys = memory + positions(source)
        place = self.state[f"{predictor}.query_embed.weight"].expand(len(memory), -1, -1)
        queries, outputs = torch.zeros_like(place), []
        for index in range(LAYERS):
            layer = f"{predictor}.transformer.decoder.layers.{index}"
            placed = queries + place
            queries = self.norm(f"{layer}.norm1", queries + self.attend(f"{layer}.self_attn", placed, placed, queries))
            seen = self.attend(f"{layer}.multihead_attn", queries + place, keys, memory)
            queries = self.norm(f"{layer}.norm2", queries + seen)
            queries = self.norm(f"{layer}.norm3", queries + self.feed_forward(layer, queries))
            outputs.append(self.norm(f"{predictor}.transformer.decoder.norm", queries))
        embeddings = states = torch.stack(outputs)
        for index in range(3):
            embeddings = self.linear(
                f"{predictor}.mask_embed.layers.{index}", embeddings.relu() if index else embeddings
            )
        return self.linear(f"{predictor}.class_embed", states), torch.einsum(
            "lbqc,bchw->lbqhw", embeddings, mask_features
        )


def positions(feature):
    return sine_position_embedding(*feature.shape[-2:], DIM).flatten(0, 1)


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
@pytest.mark.parametrize("pixel_decoder", [FPN, ENCODED], ids=lambda config: config.kind)
@torch.no_grad()
def test_checkpoint_gives_the_outputs_of_its_own_code(pixel_decoder, backbone):
    torch.manual_seed(0)
    model = maskformer(pixel_decoder, backbone)
    channels = model.backbone.channels
    of_backbone = {n: t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    official = to_official_names(of_backbone) | official_heads(pixel_decoder is ENCODED, channels)
    report = load_weights(model, official)
    assert report.layout == "official"
    assert report.complete, report
    assert not report.unexpected, report
    maps = [torch.randn(2, c, -(-72 // s), -(-100 // s)) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
    mask_features, features = model.pixel_decoder(maps)
    predictions = model.transformer_decoder(maps[-1:] if model.decodes_backbone else features, mask_features)
    class_logits, mask_logits = Reference(official).predict(maps)
    torch.testing.assert_close(predictions.class_logits, class_logits, rtol=0, atol=2e-5)
    for layer in range(LAYERS):
        wanted = mask_logits[layer]
        torch.testing.assert_close(
            predictions.mask_logits(layer), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
        )


def test_class_and_query_weights_of_another_size_are_skipped():
    decoder = dataclasses.replace(STANDARD, num_queries=7)
    report = load_weights(maskformer(FPN, decoder=decoder), official_heads(False, CHANNELS))
    assert report.skipped == ("transformer_decoder.query_embed.weight (file (5, 64), model (7, 64))",)


def test_heads_from_before_version_2_are_recognised():
    old = {n.replace("head.pixel_decoder.", "head."): t for n, t in official_heads(False, CHANNELS).items()}
    report = load_weights(maskformer(FPN), old)
    assert not report.unexpected
    assert all(name.startswith("backbone.") for name in report.missing)


@pytest.mark.parametrize(
    ("encoded", "pixel_decoder", "decoder"),
    [
        (False, ENCODED, STANDARD),
        (True, FPN, STANDARD),
        (False, SemanticFPNPixelDecoderConfig(conv_dim=DIM, mask_dim=MASK_DIM), STANDARD),
        (False, FPN, MaskedTransformerDecoderConfig(num_queries=QUERIES, hidden_dim=DIM, num_heads=HEADS)),
        (False, FPN, dataclasses.replace(STANDARD, num_layers=LAYERS + 1)),
        (True, dataclasses.replace(ENCODED, num_layers=LAYERS - 1), STANDARD),
    ],
)
def test_error_for_a_model_with_other_heads_states_the_settings(encoded, pixel_decoder, decoder):
    model = maskformer(pixel_decoder, decoder=decoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = "{kind: transformer_fpn, num_layers: 2}" if encoded else "{kind: fpn}"
    with pytest.raises(WeightsError) as caught:
        load_weights(model, official_heads(encoded, CHANNELS))
    assert "the given state dict is a MaskFormer; its heads have" in str(caught.value)
    assert str(caught.value).endswith(
        f"set model.pixel_decoder to {kind} and model.transformer_decoder to {{kind: standard, num_layers: 2}}"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("add", "drop", "variant"),
    [
        ("predictor.weight", "predictor.", r"per-pixel classification instead of masks \(PerPixelBaselineHead\)"),
        ("predictor.transformer.x", "predictor.class_embed.", "per-pixel classification instead of masks"),
        ("predictor.transformer.encoder.layers.0.norm1.weight", "-", r"encoder inside the predictor .*ENC_LAYERS"),
        ("pixel_decoder.transformer.encoder.norm.weight", "-", r"LayerNorms before the blocks .*PRE_NORM"),
        ("predictor.transformer.x", "predictor.transformer.decoder.layers.0.self_attn.", "without self-attention"),
    ],
)
def test_unsupported_maskformer_variants_are_named(add, drop, variant):
    state = official_heads(True, CHANNELS)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(f"sem_seg_head.{drop}")}
    with pytest.raises(
        WeightsError, match=f"the given state dict: .* a MaskFormer model with .*{variant}.*does not support"
    ):
        load_weights(maskformer(ENCODED), kept | {f"sem_seg_head.{add}": torch.zeros(1)})
