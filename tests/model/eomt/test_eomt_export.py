"""Export of EoMT to `transformers`, to a graph and to ONNX, and import from `transformers`."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch
import transformers

from m2f.model.config import (
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    UpscalePixelDecoderConfig,
)
from m2f.model.errors import ConfigError, WeightsError
from m2f.model.export.graphs import Inference, export_hugging_face, export_program, write_onnx
from m2f.model.export.hugging_face import known_labels, read_hugging_face_config
from m2f.model.mask2former import build_model
from m2f.model.weights.architecture import require_same_architecture
from m2f.model.weights.load import load_weights

OPTIONS = {"embed_dim": 32, "depth": 3, "num_heads": 2}
BACKBONES = {
    "eomt": ("vit_small_patch14_reg4_dinov2", OPTIONS | {"img_size": 64, "mlp_ratio": 4.0}),
    "giant": ("vit_giant_patch14_reg4_dinov2", OPTIONS | {"img_size": 64, "mlp_ratio": 5.5}),
    "eomt_dinov3": ("vit_small_patch16_dinov3_qkvb", OPTIONS | {"mlp_ratio": 2.0}),
}


def config_of(family: str) -> ModelConfig:
    name, options = BACKBONES[family]
    return ModelConfig(
        backbone=TimmBackboneConfig(name=name, features="tokens", options=options),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=6, num_layers=2),
        num_classes=3,
    )


def trained_model(family: str):
    torch.manual_seed(2)
    model = build_model(config_of(family), pretrained_backbone=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.transformer_decoder.set_probabilities((0.0, 0.0))
    return model


@pytest.mark.parametrize("family", BACKBONES)
def test_transformers_loads_an_exported_folder_and_gives_the_same_outputs(family, tmp_path):
    model, config = trained_model(family), config_of(family)
    export_hugging_face(model, config, tmp_path, ["cat", "dog", "sky"], shortest_edge=64, max_size=64)
    library = transformers.AutoModelForUniversalSegmentation
    theirs, found = library.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    theirs.grid_size = (4, 4)  # transformers has a fixed size; DINOv3's weights do not tell it
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, ours = theirs.eval()(images), model(images)
    torch.testing.assert_close(ours.class_logits[-1], expected.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.mask_logits(), expected.masks_queries_logits, rtol=1e-4, atol=1e-3)

    read = read_hugging_face_config(tmp_path).config
    assert known_labels(tmp_path) == ("cat", "dog", "sky")
    assert read.backbone == config.backbone
    assert read.transformer_decoder == config.transformer_decoder
    require_same_architecture(tmp_path, config, "a folder")
    again = build_model(read, pretrained_backbone=False)
    assert load_weights(again, tmp_path).complete
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("width", "shape", "name"),
    [
        (384, (12, 6), "vit_small_patch14_reg4_dinov2"),
        (768, (12, 12), "vit_base_patch14_reg4_dinov2"),
        (1024, (24, 16), "vit_large_patch14_reg4_dinov2"),
    ],
)
def test_published_sizes_are_recognised_by_shape(width, shape, name, tmp_path):
    library = transformers.EomtConfig(hidden_size=width, num_hidden_layers=shape[0], num_attention_heads=shape[1])
    library.save_pretrained(tmp_path)
    read = read_hugging_face_config(tmp_path).config
    assert read.backbone == TimmBackboneConfig(name=name, features="tokens", options={"img_size": 640})
    assert read.transformer_decoder.num_queries == 200


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "eomt_dinov3", "use_swiglu_ffn": True}, "use_swiglu_ffn is True; only False is supported"),
        ({"model_type": "eomt", "patch_size": [16, 16]}, r"patch_size is \[16, 16\]; it must be an integer"),
    ],
)
def test_unsupported_values_are_named_in_the_error(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=message):
        read_hugging_face_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "size", "onnx"),
    [
        ("eomt_dinov3", None, False),
        pytest.param("eomt_dinov3", None, True, marks=pytest.mark.soak),
        ("eomt", None, False),  # ONNX cannot interpolate positions
        ("eomt", (64, 64), True),
    ],
)
def test_exported_graph_gives_the_same_outputs(family, size, onnx, tmp_path):
    model = trained_model(family)
    program = export_program(model, size)
    attention = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(attention) == OPTIONS["depth"]
    assert all((*node.args[3:4], node.kwargs.get("attn_mask"))[0] is None for node in attention)  # no masks
    images = torch.rand(1, 3, *(size or (96, 160))) * 255
    with torch.no_grad():
        expected = Inference(model)(images)
        for found, wanted in zip(program.module()(images), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    if family == "eomt" and size is None:
        with pytest.raises(WeightsError, match="no operation that interpolates this model's learned positions"):
            write_onnx(program, tmp_path / "model.onnx")
    if onnx:
        write_onnx(program, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-2)


def test_incompatible_settings_are_refused():
    tokens = TimmBackboneConfig(name="vit_small_patch16_dinov3_qkvb", features="tokens")
    with pytest.raises(ConfigError, match=r"cannot be combined; set all of transformer_decoder\.kind eomt"):
        ModelConfig(transformer_decoder=EomtDecoderConfig())
    with pytest.raises(ConfigError, match=r"kind ms_deform_attn, model\.backbone\.features tokens"):
        ModelConfig(
            backbone=tokens,
            pixel_decoder=MSDeformAttnPixelDecoderConfig(),
            transformer_decoder=MaskedTransformerDecoderConfig(),
        )
    for name, message in (("vit_tiny_patch16_224", "cannot provide tokens"), ("resnet50", "timm cannot build")):
        backbone = TimmBackboneConfig(name=name, features="tokens")
        config = ModelConfig(
            backbone=backbone,
            pixel_decoder=UpscalePixelDecoderConfig(),
            transformer_decoder=EomtDecoderConfig(),
            num_classes=2,
        )
        with pytest.raises(ConfigError, match=message):
            build_model(config, pretrained_backbone=False)
    with pytest.raises(ConfigError, match=r"it needs model\.weights and the base weights"):
        ModelConfig(weights="deltas.bin", weights_are_deltas=True)
    swin = SwinBackboneConfig(pretrained="swin_tiny_patch4_window7_224")
    assert ModelConfig(backbone=swin, weights="deltas.bin", weights_are_deltas=True).weights_are_deltas
    with pytest.raises(ConfigError, match="one pair of steps for each of num_layers"):
        EomtDecoderConfig(annealing=((0, 1),))
