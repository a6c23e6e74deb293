"""Command-line tests of `m2f export` and `m2f predict` with Hugging Face folders and official checkpoints."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch

from m2f.cluster.cli import main
from m2f.cluster.predict import export
from m2f.cluster.predict.trained_model import open_trained
from m2f.cluster.recipe.load import load_recipe
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.model.config import (
    EomtDecoderConfig,
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
    UpscalePixelDecoderConfig,
)
from m2f.model.export.graphs import export_hugging_face
from m2f.model.mask2former import build_model
from m2f.model.weights.names import to_official_names
from m2f.trainer.checkpoint.folder import CheckpointManifest, file_entry
from m2f.trainer.checkpoint.weights import known_class_rows, read_identity

RECIPE = """
name: small
output: {folder}/runs
datasets: {{train: {{shards: {folder}/absent}}}}
data: {{train: [{{dataset: train}}]}}
model:
  backbone: {{name: resnet50, options: {{layers: [1, 1, 1, 1], channels: [8, 16, 24, 32]}}}}
  pixel_decoder: {{conv_dim: 32, mask_dim: 16, num_layers: 1, num_heads: 2, feedforward_dim: 40}}
  transformer_decoder: {{num_queries: 5, num_layers: 2, hidden_dim: 32, num_heads: 2, feedforward_dim: 48}}
  num_classes: 3
training: {{max_steps: 10}}
evaluation: {{shortest_edge: 64, max_size: 96}}
"""
CONFIG = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet50", options={"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=32, mask_dim=16, num_layers=1, num_heads=2, feedforward_dim=40
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=5, num_layers=2, hidden_dim=32, num_heads=2, feedforward_dim=48
    ),
    num_classes=3,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG).eval()


@pytest.fixture
def hugging_face(tmp_path, model):
    folder = tmp_path / "hugging_face"
    export_hugging_face(model, CONFIG, folder, ["person", "sky", "tree"], shortest_edge=64, max_size=96)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    torch.save({"model": to_official_names(model.state_dict())}, tmp_path / "official.pth")
    return path


def m2f(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_hugging_face_folder_can_predict_and_be_exported_again(tmp_path, capsys, model, hugging_face):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    status, text = m2f(capsys, "predict", hugging_face, tmp_path / "image.png", "--output", tmp_path / "predictions")
    assert status == 0, text
    assert {path.name for path in (tmp_path / "predictions").iterdir()} >= {"overlays", "panoptic", "panoptic.json"}
    names = [entry["name"] for entry in json.loads((tmp_path / "predictions" / "categories.json").read_text())]
    assert names == ["person", "sky", "tree"]

    status, text = m2f(capsys, "export", hugging_face, "--format", "hugging_face", "--output", tmp_path / "copy")
    assert status == 0, text
    assert "with 3 classes" in text
    first, second = (open_trained(str(folder), (), None) for folder in (hugging_face, tmp_path / "copy"))
    assert second.classes == first.classes
    assert second.config == first.config == CONFIG
    assert second.evaluation == first.evaluation
    assert (second.evaluation.shortest_edge, second.evaluation.max_size) == (64, 96)
    assert all(torch.equal(value, second.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_export_states_the_class_that_opens_the_folder(tmp_path, capsys, hugging_face):
    vit = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
    config = ModelConfig(
        backbone=TimmBackboneConfig(name="vit_small_patch16_dinov3_qkvb", features="tokens", options=vit),
        pixel_decoder=UpscalePixelDecoderConfig(),
        transformer_decoder=EomtDecoderConfig(num_queries=5, num_layers=2),
        num_classes=2,
    )
    export_hugging_face(build_model(config), config, tmp_path / "eomt", ["cat", "sky"], shortest_edge=64, max_size=64)
    for folder, name in ((tmp_path / "eomt", "EomtDinov3"), (hugging_face, "Mask2Former")):
        status, text = m2f(capsys, "export", folder, "--format", "hugging_face", "--output", folder / "again")
        assert status == 0, text
        assert f"Hugging Face {name}ForUniversalSegmentation with" in text


def test_hugging_face_folder_predicts_with_the_settings_of_its_recipe(tmp_path, capsys, caplog, recipe):
    settings = (
        "model.postprocess={object_threshold: 0.5, overlap_threshold: 0.6, max_instances: 7}",
        "model.postprocess.semantic_resize=class_scores",
        "evaluation.shrink=bilinear",
        "evaluation.precision=bf16",
        "evaluation.test_time={kind: windows, size: 64, stride: 32}",
    )
    weights, folder = tmp_path / "official.pth", tmp_path / "hf"
    words = ("export", recipe, *settings, "--checkpoint", weights, "--format", "hugging_face", "--output", folder)
    status, text = m2f(capsys, *words)
    assert status == 0, text
    expected, trained = open_trained(str(recipe), settings, str(weights)), open_trained(str(folder), (), None)
    assert trained.config.postprocess == expected.config.postprocess
    assert trained.config.postprocess.object_threshold == 0.5
    assert trained.evaluation == expected.evaluation
    assert "the stored recipe cannot be read" not in caplog.text

    stored = (folder / "config.json").read_text()
    (folder / "config.json").write_text(stored.replace("overlap_threshold", "threshold_of_a_newer_version"))
    trained = open_trained(str(folder), (), None)
    assert trained.config == CONFIG
    assert trained.evaluation == EvaluationConfig(shortest_edge=64, max_size=96)
    assert "the stored recipe cannot be read, so model.postprocess and evaluation have their default" in caplog.text
    assert "threshold_of_a_newer_version`: no such setting" in caplog.text


def test_hugging_face_folder_with_other_classes_than_its_notes_has_the_new_classes(tmp_path, capsys, caplog, recipe):
    weights, folder = tmp_path / "official.pth", tmp_path / "hf"
    words = ("export", recipe, "--checkpoint", weights, "--format", "hugging_face", "--output", folder)
    assert m2f(capsys, *words)[0] == 0
    identity = read_identity(str(folder), Storage())
    config = json.loads((folder / "config.json").read_text())
    new = ["class 2", "pear", "class 0"]
    config["id2label"] = {str(label): name for label, name in enumerate(new)}
    (folder / "config.json").write_text(json.dumps(config))
    trained = open_trained(str(folder), (), None)
    assert [(c.id, c.name, c.is_thing) for c in trained.classes] == [(i, name, True) for i, name in enumerate(new)]
    assert trained.recipe == ""
    assert "The names in `id2label` are used" in caplog.text
    assert read_identity(str(folder), Storage()) is None
    assert known_class_rows(identity, str(folder), Storage()) == (2, None, 0)


class TwoOutputs(torch.nn.Linear):
    """Module with as many outputs as an exported model."""

    def forward(self, images):
        return super().forward(images), images


def test_onnx_weights_in_a_file_of_their_own_stay_beside_the_graph(tmp_path, recipe, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    program = torch.export.export(TwoOutputs(64, 64).eval(), (torch.zeros(2, 64),))
    monkeypatch.setattr(export, "export_program", lambda model, size: program)
    trained = open_trained(str(recipe), (), str(tmp_path / "official.pth"))
    text = export.write_model(trained, "onnx", tmp_path / "out/model.onnx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert text.endswith("; keep model.onnx and model.onnx.data in one folder")
    runtime.InferenceSession(shutil.copytree(tmp_path / "out", tmp_path / "copy") / "model.onnx")

    def fail(path):
        path.write_bytes(b"")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        export._write_atomically(tmp_path / "failed/model.onnx", fail)
    assert not list((tmp_path / "failed").iterdir())


def test_transformers_folder_is_exported_unchanged(tmp_path, capsys, hugging_face):
    transformers = pytest.importorskip("transformers")
    original = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(hugging_face).eval()
    original.save_pretrained(tmp_path / "saved")
    status, text = m2f(capsys, "export", tmp_path / "saved", "--format", "hugging_face", "--output", tmp_path / "copy")
    assert status == 0, text
    exported = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "copy").eval()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = original(pixel_values=images), exported(pixel_values=images)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=0, atol=1e-5)


def test_an_official_checkpoint_with_a_recipe_is_opened_without_the_data(tmp_path, capsys, model, recipe):
    words = ("export", recipe, "--checkpoint", tmp_path / "official.pth")
    status, text = m2f(capsys, *words, "--format", "hugging_face", "--output", tmp_path / "hf")
    assert status == 0, text
    assert [c.name for c in open_trained(str(tmp_path / "hf"), (), None).classes] == ["class 0", "class 1", "class 2"]
    status, text = m2f(capsys, *words, "--format", "official", "--output", tmp_path / "again.pth")
    assert status == 2  # the official code cannot build a model of this size
    assert "the official Mask2Former supports only" in text
    identity = read_identity(str(tmp_path / "hf"), Storage())
    assert identity is not None
    assert [c.name for c in identity.label_spaces[0].classes] == ["class 0", "class 1", "class 2"]
    assert (identity.num_queries, identity.input.shortest_edge) == (5, 64)
    # --checkpoint also accepts a Hugging Face folder
    trained = open_trained(str(recipe), (), str(tmp_path / "hf"))
    assert all(torch.equal(value, trained.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_checkpoint_folder_opens_without_other_arguments(tmp_path, model, recipe):
    folder = tmp_path / "runs" / "small" / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    (folder / "recipe.yaml").write_text(recipe.read_text())
    files = {"weights.safetensors": file_entry(folder / "weights.safetensors")}
    (folder / "manifest.json").write_bytes(CheckpointManifest(7, 1, 1, files).to_json())
    trained = open_trained(str(folder), (), None)
    assert trained.weights == str(folder)
    assert trained.config.num_classes == 3
    assert load_recipe(recipe).evaluation == trained.evaluation


def test_export_errors_print_one_message(tmp_path, capsys, recipe, hugging_face):
    weights, cut = tmp_path / "official.pth", tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "there.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    official, given = ("--format", "official", "--output"), ("--checkpoint", weights)
    for words, message in (
        ((recipe, *given, *official, tmp_path / "there.pth"), "there.pth exists; remove it or choose another name"),
        ((recipe, *given, *official, tmp_path / "new.bin"), "its name must end in .pth"),
        ((recipe, *given, *official, "s3://bucket/new.pth"), "give a local path, and copy the export from there"),
        ((recipe, *given, *official, tmp_path / "n.pth", "--size", "64", "64"), "not to official"),
        ((weights, *official, tmp_path / "new.pth"), "is only a weight file; give the recipe of its model"),
        ((weights, *given, *official, tmp_path / "new.pth"), "which cannot be combined with --checkpoint"),
        ((tmp_path / "empty", *official, tmp_path / "new.pth"), "neither a recipe.yaml"),
        ((hugging_face, *given, *official, tmp_path / "new.pth"), "so settings and --checkpoint have no effect"),
        ((recipe, "--checkpoint", cut, *official, tmp_path / "new.pth"), "it may be truncated, it has 5000 bytes"),
        ((recipe, *official, tmp_path / "new.pth"), "has no checkpoint; train first"),
        (
            (recipe, "model.num_classes=8", *given, *official, tmp_path / "new.pth"),
            "does not contain all weights of the recipe's model with 8 classes",
        ),
        (
            (recipe, "model.pixel_decoder.feedforward_dim=41", *given, *official, tmp_path / "new.pth"),
            "belongs to another architecture",
        ),
    ):
        status, text = m2f(capsys, "export", *words)
        assert status == 2, text
        assert message in text
        assert "Traceback" not in text
    assert not list(tmp_path.glob("*.partial*"))
    assert not (tmp_path / "new.pth").exists()
