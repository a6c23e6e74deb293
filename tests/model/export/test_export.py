"""Exported models: `transformers`, torch.export and onnxruntime load them and give the same outputs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from m2f.model.config import (
    BiFPNPixelDecoderConfig,
    FaPNPixelDecoderConfig,
    FPNPixelDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    SemanticFPNPixelDecoderConfig,
    StandardTransformerDecoderConfig,
    SwinBackboneConfig,
    TimmBackboneConfig,
    TransformerFPNPixelDecoderConfig,
)
from m2f.model.errors import WeightsError
from m2f.model.export.graphs import (
    Inference,
    export_hugging_face,
    export_program,
    write_onnx,
    write_program,
)
from m2f.model.export.hugging_face import read_hugging_face_config, write_hugging_face_config
from m2f.model.export.official import export_official, require_official, write_official
from m2f.model.mask2former import build_model
from m2f.model.weights.architecture import require_same_architecture
from m2f.model.weights.load import load_weights

LABELS = ("person", "sky", "tree")
RESNET = TimmBackboneConfig(name="resnet50", options={"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)})
SWIN = SwinBackboneConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path=0.1)


TINY_SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}


def export_config(backbone, num_layers=3):
    return ModelConfig(
        backbone=backbone,
        pixel_decoder=MSDeformAttnPixelDecoderConfig(
            conv_dim=32, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=40
        ),
        transformer_decoder=MaskedTransformerDecoderConfig(
            num_queries=5, num_layers=num_layers, hidden_dim=32, num_heads=2, feedforward_dim=48
        ),
        num_classes=len(LABELS),
    )


def official_config():
    """Return a small config that the official code supports."""
    config = export_config(SWIN)
    return dataclasses.replace(config, pixel_decoder=dataclasses.replace(config.pixel_decoder, feedforward_dim=1024))


def random_model(config):
    """Return a model with noise on all weights, since deformable sampling and frozen norms start with trivial ones."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand_like(tensor)
    return model


def assert_same_outputs(ours, theirs, tolerance=1e-5):
    for size in ((64, 96), (96, 64)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            actual, expected = theirs(pixel_values=images), ours(images)
        pairs = (
            (actual.class_queries_logits, expected.class_logits[-1]),
            (actual.masks_queries_logits, expected.mask_logits()),
        )
        for theirs_out, ours_out in pairs:
            assert (theirs_out - ours_out).abs().max() < tolerance * max(1, ours_out.abs().max())


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
def test_folders_load_in_transformers_and_folders_of_transformers_load_here(tmp_path, backbone):
    transformers = pytest.importorskip("transformers")
    config = export_config(backbone)
    model = random_model(config)
    export_hugging_face(model, config, tmp_path / "ours", LABELS, notes={"task": "panoptic"}, shortest_edge=320)
    opened, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert opened.config.id2label == dict(enumerate(LABELS))
    assert_same_outputs(model, opened.eval())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_mean == pytest.approx((0.485, 0.456, 0.406))
    assert processor.size["shortest_edge"] == 320

    opened.save_pretrained(tmp_path / "theirs")
    described = read_hugging_face_config(tmp_path / "theirs")
    assert described.config == config
    assert described.labels == LABELS
    assert described.notes == {"task": "panoptic"}
    in_files, in_memory = build_model(described.config).eval(), build_model(described.config)
    for report in (load_weights(in_files, tmp_path / "theirs"), load_weights(in_memory, opened.state_dict())):
        assert report.layout == "hugging_face"
        assert report.complete, report
        assert not report.unexpected, report
    assert all(torch.equal(value, in_memory.state_dict()[key]) for key, value in in_files.state_dict().items())
    assert_same_outputs(in_files, opened)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "maskformer"}, "model_type is 'maskformer'; only mask2former, eomt, eomt_dinov3 are supported"),
        ({"pre_norm": True}, "pre_norm is True; only False is supported"),
        ({"backbone_config": {"model_type": "dinov2"}}, "backbone_config.model_type is 'dinov2'; only swin and resnet"),
        ({"backbone_config": {"model_type": "swin", "embed_dim": 8}}, "backbone_config.depths is missing"),
        ({"feature_strides": [8, 16, 32]}, "feature_strides is"),
        ({"backbone_config": TINY_SWIN, "id2label": {"1": "a"}}, "id2label is {'1': 'a'}; its keys must be the class"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path, changes, message):
    content = {"model_type": "mask2former", "backbone_config": {"model_type": "swin"}, "id2label": {"0": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(WeightsError, match=re.escape(message)):
        read_hugging_face_config(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("backbone", TimmBackboneConfig(name="convnext_atto"), "supports resnet50, resnet101 and kind swin"),
        ("pixel_decoder", FPNPixelDecoderConfig(), "pixel_decoder.kind is fpn"),
        ("transformer_decoder", MaskedTransformerDecoderConfig(attention="cross"), "attention is 'cross'"),
        ("pixel_decoder", MSDeformAttnPixelDecoderConfig(conv_dim=48), "pixel_decoder.conv_dim is 48"),
        ("transformer_decoder", MaskedTransformerDecoderConfig(num_heads=4), "one number for both"),
    ],
)
def test_models_without_hugging_face_counterpart_are_refused(tmp_path, part, value, message):
    config = dataclasses.replace(ModelConfig(num_classes=3), **{part: value})
    with pytest.raises(WeightsError, match=re.escape(message)):
        export_hugging_face(nn.Module(), config, tmp_path, LABELS)


@pytest.mark.parametrize("name", ["resnet50.tv_in1k", "resnet101.tv_in1k"])
def test_backbones_of_the_papers_recipes_are_exported_and_fit_the_exported_folder(tmp_path, name):
    config = ModelConfig(backbone=TimmBackboneConfig(name=name, norm="sync_batch"), num_classes=len(LABELS))
    write_hugging_face_config(tmp_path, config, LABELS, notes={}, shortest_edge=800, max_size=1333)
    assert read_hugging_face_config(tmp_path).config.backbone == TimmBackboneConfig(name=name.partition(".")[0])
    require_same_architecture(tmp_path, config, "a folder")
    other = dataclasses.replace(config, backbone=TimmBackboneConfig(name="resnet152.tv_in1k"))
    with pytest.raises(WeightsError, match=r"model\.backbone\.name: resnet\d+ -> resnet152\.tv_in1k"):
        require_same_architecture(tmp_path, other, "a folder")


def test_official_checkpoints_have_the_detectron_format(tmp_path):
    config = official_config()
    model = random_model(config)
    write_official(model, config, tmp_path / "model.pth", {"m2f.identity": "{}"})
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert (set(content), content["m2f.identity"]) == ({"model", "m2f.identity"}, "{}")  # official code reads `model`
    assert content["model"]._metadata["sem_seg_head"] == {"version": 2}
    other = build_model(config)
    assert load_weights(other, tmp_path / "model.pth").complete
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


class OfficialHead(nn.Module):
    """Imitates how the official MaskFormerHead renames weights if the state dict has no or an older version number."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.pixel_decoder = nn.ModuleDict({"mask_features": nn.Linear(2, 2)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") is None or local_metadata["version"] < 2:
            for name in [name for name in state_dict if name.startswith(prefix)]:
                state_dict[name.replace(prefix, f"{prefix}pixel_decoder.")] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_the_official_loader_finds_the_pixel_decoder(tmp_path):
    config = official_config()
    write_official(random_model(config), config, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    official = nn.ModuleDict({"sem_seg_head": OfficialHead()})
    name = "sem_seg_head.pixel_decoder.mask_features.weight"
    small = OrderedDict({key: torch.ones(2, 2) if key == name else torch.ones(2) for key in official.state_dict()})
    assert name in state
    assert set(official.load_state_dict(OrderedDict(small), strict=False).missing_keys) == set(small)  # issue 95
    small._metadata = state._metadata
    assert official.load_state_dict(small, strict=False).missing_keys == []


MASKED = "transformer_decoder", MaskedTransformerDecoderConfig
RESNET50 = "backbone", TimmBackboneConfig
DEFORMABLE = "pixel_decoder", MSDeformAttnPixelDecoderConfig


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (MASKED, {"attention": "cross"}, "transformer_decoder.attention is 'cross'"),
        (MASKED, {"attention": "mask_pooling"}, "transformer_decoder.attention is 'mask_pooling'"),
        (MASKED, {"attention": "smca"}, "transformer_decoder.attention is 'smca'"),
        (MASKED, {"queries": "zero"}, "transformer_decoder.queries is 'zero'"),
        (MASKED, {"queries": "learnable"}, "transformer_decoder.queries is 'learnable'"),
        (MASKED, {"features": "naive_multi_scale"}, "transformer_decoder.features is 'naive_multi_scale'"),
        (MASKED, {"features": "stride_8"}, "transformer_decoder.features is 'stride_8'"),
        (MASKED, {"features": "stride_16"}, "transformer_decoder.features is 'stride_16'"),
        (MASKED, {"features": "stride_32"}, "transformer_decoder.features is 'stride_32'"),
        (MASKED, {"cross_attention_first": False}, "transformer_decoder.cross_attention_first is False"),
        (MASKED, {"num_heads": 4}, "pixel_decoder.num_heads is 8"),
        (("transformer_decoder", StandardTransformerDecoderConfig), {}, "transformer_decoder.kind is 'standard'"),
        (("pixel_decoder", FPNPixelDecoderConfig), {}, "pixel_decoder.kind is 'fpn'"),
        (("pixel_decoder", SemanticFPNPixelDecoderConfig), {}, "pixel_decoder.kind is 'semantic_fpn'"),
        (("pixel_decoder", BiFPNPixelDecoderConfig), {}, "pixel_decoder.kind is 'bifpn'"),
        (("pixel_decoder", FaPNPixelDecoderConfig), {}, "pixel_decoder.kind is 'fapn'"),
        (("pixel_decoder", TransformerFPNPixelDecoderConfig), {}, "pixel_decoder.kind is 'transformer_fpn'"),
        (DEFORMABLE, {"num_points": 8}, "pixel_decoder.num_points is 8"),
        (DEFORMABLE, {"feedforward_dim": 512}, "pixel_decoder.feedforward_dim is 512"),
        (DEFORMABLE, {"conv_dim": 48}, "pixel_decoder.conv_dim is 48"),
        (RESNET50, {"name": "convnext_atto"}, "backbone.name is 'convnext_atto'"),
        (RESNET50, {"name": "resnet50d"}, "backbone.name is 'resnet50d'"),
        (RESNET50, {"norm": "group"}, "backbone.norm is 'group'"),
        (RESNET50, {"norm": "native"}, "backbone.norm is 'native'"),
        (RESNET50, {"options": {"layers": [2, 2, 2, 2]}}, "backbone.options is {'layers': [2, 2, 2, 2]}"),
        (RESNET50, {"options": {"channels": [8, 16, 24, 32]}}, "backbone.options is {'channels': [8, 16, 24, 32]}"),
    ],
)
def test_models_without_official_counterpart_are_refused(tmp_path, part, options, message):
    name, kind = part
    config = dataclasses.replace(ModelConfig(num_classes=3), **{name: kind(**options)})
    for export in (
        lambda: write_official(nn.Module(), config, tmp_path / "model.pth"),
        lambda: export_official(nn.Module(), config),
    ):
        with pytest.raises(WeightsError, match=re.escape(f"model.{message}; the official Mask2Former supports only ")):
            export()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (MASKED, {"num_queries": 200, "num_layers": 3}),
        (MASKED, {"pre_norm": True}),
        (DEFORMABLE, {"num_layers": 3, "conv_dim": 128, "mask_dim": 64}),
        (RESNET50, {"name": "resnet101.tv_in1k", "norm": "sync_batch"}),
        (RESNET50, {"options": {"drop_path_rate": 0.1}}),
        (("backbone", SwinBackboneConfig), {"window_size": 12, "depths": (2, 2, 18, 2)}),
    ],
)
def test_models_with_official_counterpart_are_accepted(part, options):
    name, kind = part
    require_official(dataclasses.replace(ModelConfig(num_classes=3), **{name: kind(**options)}))


def assert_graph_equals(run, model, shapes):
    for shape in shapes:
        images = 255 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = Inference(model)(images)
        for actual, output in zip(run(images), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(actual), output, rtol=0, atol=1e-4)


def assert_graphs_equal(folder, model, shapes):
    """Save both kinds of graph, load them, and compare their outputs with the model's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    program = export_program(model)
    write_program(program, folder / "model.pt2")
    write_onnx(program, folder / "model.onnx")
    assert [path.name for path in sorted(folder.iterdir())] == ["model.onnx", "model.pt2"]
    assert_graph_equals(torch.export.load(folder / "model.pt2").module(), model, shapes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert_graph_equals(lambda images: session.run(None, {"images": images.numpy()}), model, shapes)


SMALL_RESNET = dataclasses.replace(RESNET, options={"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)})


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [SMALL_RESNET, SWIN], ids=["resnet", "swin"])
def test_one_graph_accepts_all_batch_and_image_sizes(tmp_path, backbone):
    """The sizes cover maps of one window, of whole windows, and of windows that are partly padding."""
    model = random_model(export_config(backbone, num_layers=2))
    assert_graphs_equal(tmp_path, model, ((1, 3, 64, 64), (1, 3, 96, 128), (3, 3, 128, 64), (1, 3, 224, 160)))


def test_the_size_of_a_graph_can_be_fixed():
    model = random_model(export_config(SMALL_RESNET, num_layers=1))
    graph = export_program(model, (96, 128)).module()
    assert_graph_equals(graph, model, ((1, 3, 96, 128), (3, 3, 96, 128)))
    with pytest.raises(AssertionError, match="Guard failed"):
        graph(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize(("size", "message"), [((100, 96), "divisible by 32"), ((32, 64), "at least 64")])
def test_invalid_graph_sizes_are_refused(size, message):
    with pytest.raises(WeightsError, match=message):
        export_program(nn.Module(), size)
