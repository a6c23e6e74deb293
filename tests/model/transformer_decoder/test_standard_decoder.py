"""MaskFormer: pixel decoder and transformer decoder against `transformers`, and the whole model in training."""

from __future__ import annotations

import pytest
import torch
import transformers

from m2f.model.config import (
    FPNPixelDecoderConfig,
    ModelConfig,
    StandardTransformerDecoderConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import ConfigError
from m2f.model.mask2former import Mask2Former, build_model
from m2f.model.pixel_decoder import build_pixel_decoder
from m2f.model.transformer_decoder.standard import StandardTransformerDecoder

CHANNELS, DIM, MASK_DIM, LAYERS, QUERIES, CLASSES = (32, 64, 96, 128), 64, 32, 3, 9, 7
DECODER = StandardTransformerDecoderConfig(
    num_queries=QUERIES, num_layers=LAYERS, hidden_dim=DIM, num_heads=4, feedforward_dim=80
)
FPN = FPNPixelDecoderConfig(conv_dim=DIM, mask_dim=MASK_DIM)
ENCODED = TransformerFPNPixelDecoderConfig(
    conv_dim=DIM, mask_dim=MASK_DIM, num_layers=1, num_heads=4, feedforward_dim=48
)
BACKBONE = TimmBackboneConfig(name="resnet50", options={"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)})


def hugging_face_maskformer():
    config = transformers.MaskFormerConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=list(CHANNELS),
            depths=[1, 1, 1, 1],
            layer_type="bottleneck",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        decoder_config=transformers.DetrConfig(
            d_model=DIM,
            decoder_layers=LAYERS,
            decoder_ffn_dim=80,
            decoder_attention_heads=4,
            encoder_attention_heads=4,
            num_queries=QUERIES,
        ),
        fpn_feature_size=DIM,
        mask_feature_size=MASK_DIM,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    twin = transformers.MaskFormerForInstanceSegmentation(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 / max(1, parameter[0].numel()) ** 0.5))
    return twin


def own_weights(twin):
    """Return the weights of transformers' pixel decoder and transformer decoder under our names."""
    theirs = twin.state_dict()

    def take(prefix, **places):
        return {
            f"{own}.{suffix}": theirs[f"{prefix}.{name}.{suffix}"]
            for own, name in places.items()
            for suffix in ("weight", "bias")
            if f"{prefix}.{name}.{suffix}" in theirs
        }

    module, fpn = "model.transformer_module", "model.pixel_level_module.decoder"
    pixel = take(fpn, mask_features="mask_projection")
    pixel |= take(fpn, **{f"fpn.top.{i}": f"fpn.stem.{i}" for i in range(2)})
    for step in range(3):
        parts = {"lateral": "proj", "output": "block"}
        names = {f"fpn.steps.{step}.{o}.{i}": f"fpn.layers.{step}.{n}.{i}" for o, n in parts.items() for i in range(2)}
        pixel |= take(fpn, **names)
    own = take(module, query_embed="queries_embedder", norm="decoder.layernorm")
    own |= take(module, **{"memory.input_proj": "input_projection"})
    own |= {f"class_embed.{s}": theirs[f"class_predictor.{s}"] for s in ("weight", "bias")}
    own |= take("mask_embedder", **{f"mask_embed.{2 * i}": f"{i}.0" for i in range(3)})
    for index in range(LAYERS):
        names = {
            "cross_query": "encoder_attn.q_proj",
            "cross.output": "encoder_attn.o_proj",
            "cross.norm": "encoder_attn_layer_norm",
            "self_value": "self_attn.v_proj",
            "self_attention.output": "self_attn.o_proj",
            "self_attention.norm": "self_attn_layer_norm",
            "linear1": "mlp.fc1",
            "linear2": "mlp.fc2",
            "norm": "final_layer_norm",
        }
        own |= take(f"{module}.decoder.layers.{index}", **{f"layers.{index}.{o}": n for o, n in names.items()})
    for suffix in ("weight", "bias"):
        layers = [f"{module}.decoder.layers.{index}" for index in range(LAYERS)]
        for own_name, projection in (("key", "k_proj"), ("value", "v_proj")):
            parts = [theirs[f"{layer}.encoder_attn.{projection}.{suffix}"] for layer in layers]
            own[f"memory.{own_name}.{suffix}"] = torch.cat(parts)
        for index, layer in enumerate(layers):
            parts = [theirs[f"{layer}.self_attn.{projection}.{suffix}"] for projection in ("q_proj", "k_proj")]
            own[f"layers.{index}.self_query_key.{suffix}"] = torch.cat(parts)
    return pixel, own


def logits_of_every_layer(twin, maps):
    """Return class and mask logits [L, ...], computed from layer outputs that hooks collect.

    The auxiliary loss of transformers stays off. With it, transformers passes the *normalised* queries of a layer to
    the next one, unlike the official code.
    """
    states = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
        for layer in twin.model.transformer_module.decoder.layers
    ]
    pixels = twin.model.pixel_level_module.decoder(maps).last_hidden_state
    final = twin.model.transformer_module(maps[-1]).last_hidden_state
    for hook in hooks:
        hook.remove()
    normalised = twin.model.transformer_module.decoder.layernorm(torch.stack(states))
    assert torch.equal(normalised[-1], final)
    return twin.class_predictor(normalised), torch.einsum("lbqc,bchw->lbqhw", twin.mask_embedder(normalised), pixels)


@pytest.mark.parametrize("size", [(64, 96), (100, 60)], ids=str)
@torch.no_grad()
def test_every_layer_equals_the_independent_implementation(size):
    twin = hugging_face_maskformer()
    pixel_decoder = build_pixel_decoder(FPN, CHANNELS).eval()
    decoder = StandardTransformerDecoder(DECODER, CHANNELS[-1], MASK_DIM, CLASSES).eval()
    pixel_weights, weights = own_weights(twin)
    pixel_decoder.load_state_dict(pixel_weights)
    decoder.load_state_dict(weights)
    generator = torch.Generator().manual_seed(1)
    strides = zip(CHANNELS, (4, 8, 16, 32), strict=True)
    maps = [torch.randn(2, c, -(-size[0] // s), -(-size[1] // s), generator=generator) for c, s in strides]

    predictions = decoder(maps[-1:], pixel_decoder(maps)[0])

    class_logits, mask_logits = logits_of_every_layer(twin, maps)
    assert predictions.class_logits.shape == class_logits.shape == (LAYERS, 2, QUERIES, CLASSES + 1)
    torch.testing.assert_close(predictions.class_logits, class_logits, rtol=0, atol=1e-4)
    for layer in range(LAYERS):
        torch.testing.assert_close(predictions.mask_logits(layer), mask_logits[layer], rtol=0, atol=1e-4)


def maskformer(pixel_decoder) -> Mask2Former:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(backbone=BACKBONE, pixel_decoder=pixel_decoder, transformer_decoder=DECODER, num_classes=CLASSES)
    )


@pytest.mark.parametrize("pixel_decoder", [FPN, ENCODED], ids=lambda config: config.kind)
@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
def test_every_parameter_of_the_whole_model_gets_a_gradient(pixel_decoder, mode):
    model, images = maskformer(pixel_decoder).train(), torch.randn(2, 3, 64, 96)
    if mode == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        predictions = model(images)
    assert predictions.class_logits.shape == (LAYERS, 2, QUERIES, CLASSES + 1)
    (predictions.class_logits.float().square().sum() + predictions.mask_logits().square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_decoder_reads_the_encoder_output_if_there_is_one():
    assert maskformer(FPN).transformer_decoder.memory.input_proj.in_channels == 32 * 4
    assert isinstance(maskformer(ENCODED).transformer_decoder.memory.input_proj, torch.nn.Identity)


def test_parameter_counts_are_those_of_the_paper():
    """R50 on COCO with a transformer encoder: 45M (Table 1); on ADE20K with an FPN: 41M (Table V)."""
    standard = StandardTransformerDecoderConfig()
    for pixel_decoder, classes, millions in (
        (TransformerFPNPixelDecoderConfig(), 133, 45),
        (FPNPixelDecoderConfig(), 150, 41),
    ):
        config = ModelConfig(pixel_decoder=pixel_decoder, transformer_decoder=standard, num_classes=classes)
        with torch.device("meta"):
            model = Mask2Former(config, torch.nn.Identity(), (256, 512, 1024, 2048), classes)
        backbone = 23.455
        assert backbone + sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_invalid_decoder_settings_are_refused():
    with pytest.raises(ConfigError, match="hidden_dim is 30"):
        StandardTransformerDecoderConfig(hidden_dim=30, num_heads=2)
