"""Command-line tests of `m2f analyze`: model tables, and analyses of a small model with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import m2f
from m2f.cluster.analyze.model_table import cpu_seconds_per_image, format_model_table, paper_sizes
from m2f.cluster.cli import main
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.report.panels import decode_picture
from m2f.model.analysis.flops.official import flops_counter, mean_flops
from m2f.model.analysis.paper_models import paper_models
from m2f.model.config import (
    MaskedTransformerDecoderConfig,
    ModelConfig,
    MSDeformAttnPixelDecoderConfig,
    TimmBackboneConfig,
)
from m2f.model.mask2former import build_model

RECIPE = """
name: small
output: {folder}/runs
datasets:
  train: {{shards: {folder}/shards}}
  absent: {{shards: {folder}/absent}}
data:
  train: [{{dataset: train}}]
model:
  backbone: {{name: resnet10t, norm: group, options: {{channels: [16, 16, 32, 32]}}}}
  pixel_decoder: {{conv_dim: 32, mask_dim: 32, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 3, hidden_dim: 32, num_heads: 2, feedforward_dim: 32}}
training: {{max_steps: 10}}
evaluation: {{shortest_edge: 64, max_size: 96}}
"""
SMALL = ModelConfig(
    backbone=TimmBackboneConfig(name="resnet10t", norm="group", options={"channels": [16, 16, 32, 32]}),
    pixel_decoder=MSDeformAttnPixelDecoderConfig(
        conv_dim=32, mask_dim=32, num_layers=1, num_heads=2, feedforward_dim=32
    ),
    transformer_decoder=MaskedTransformerDecoderConfig(
        num_queries=8, num_layers=3, hidden_dim=32, num_heads=2, feedforward_dim=32
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a recipe, its shards and random weights, and return their folder."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    dataset = DatasetConfig(shards=str(folder / "shards"), source=SyntheticSource(num_images=6))
    write_dataset(open_reader(dataset.source), dataset, Storage())
    torch.manual_seed(0)
    num_classes = len(open_reader(dataset.source).categories.for_task("panoptic"))
    model = build_model(ModelConfig(**{**vars(SMALL), "num_classes": num_classes}), pretrained_backbone=False)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_every_decoder_layer_is_evaluated(capsys, folder, tmp_path):
    words = ("layers", folder / "recipe.yaml", "train", "--checkpoint", folder / "weights.safetensors")
    status, out, err = run(capsys, "analyze", *words, "--images", "2", "--output", tmp_path / "out")
    assert status == 0, err
    assert out.startswith("train: 2 of 6 images, weights")
    layers = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    assert {"PQ", "AP", "mIoU", "AR10", "AR100"} <= set(layers[0]["metrics"])


def test_attention_shares_and_pictures_are_written(capsys, folder, tmp_path):
    words = ("attention", folder / "recipe.yaml", "--checkpoint", folder / "weights.safetensors")
    options = ("--images", "3", "--pictures", "2", "--output", tmp_path / "out")
    status, out, err = run(capsys, "analyze", *words, *options)
    assert status == 0, err
    assert "average" in out
    shares = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert list(shares["object_share_by_level"]) == ["1/32", "1/16", "1/8", "average"]
    assert all(0 < share < 1 for share in shares["object_share_by_layer"].values())
    pictures = sorted((tmp_path / "out").glob("attention_*.png"))
    assert len(pictures) == 2
    assert decode_picture(pictures[0].read_bytes()).shape[1] > 4 * 500


def test_recipe_table_uses_the_class_count_of_its_data(capsys, folder):
    recipe = folder / "recipe.yaml"
    status, out, _ = run(capsys, "analyze", "table", recipe, "--size", "64x96", "--seconds")
    assert status == 0
    assert out.splitlines()[0].split()[-3:] == ["CPU", "s", "64x96"]
    assert out.splitlines()[2].startswith("small")
    more = run(capsys, "analyze", "table", recipe, "--size", "64x96", "model.num_classes=5000", "--markdown")[1]
    assert more.splitlines()[1].startswith("| --- |")
    assert float(more.splitlines()[2].split("|")[3]) > float(out.split("small")[1].split()[0])


def test_paper_rows_contain_the_published_numbers():
    row = next(paper_sizes([m for m in paper_models() if m.name == "R50"], (256, 256), timed=False))
    assert (row.paper_parameters, row.paper_flops, row.table, row.cpu_seconds) == (44, 226, "I, III", None)
    assert row.executed < row.flops_at_size
    line = format_model_table([row], (64, 64), markdown=True).splitlines()[2]
    assert line.startswith("| R50 | I, III | 44.0 | 44 | 227.5 | 226 |")


@pytest.mark.slow
def test_documented_model_table_matches_the_formulas():
    documented = {}
    for line in (Path(m2f.__file__).parents[1] / "docs" / "models.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 9:
            documented[cells[0]] = cells
    assert list(documented)[2:] == [row.name for row in paper_models()]
    for row in paper_models():
        count = flops_counter(row.config)
        counted = mean_flops(row.config) if row.size is None else count(row.size, True)
        small = count((256, 256), False)
        _, table, _, _, flops, paper, official, _, _ = documented[row.name]
        assert table == row.table
        assert (flops, official) == (f"{counted.total / 1e9:.1f}", f"{(small.total - small.inference) / 1e9:.1f}")
        assert paper == ("-" if row.flops is None else f"{row.flops:.0f}")


def test_cpu_time_is_measured():
    config = ModelConfig(**{**vars(SMALL), "num_classes": 3})
    assert 0 < cpu_seconds_per_image(config, (64, 64)) < 10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["table", "model.num_classes=3"],
            "model.num_classes=3 overrides a setting of a recipe, but no recipe is given",
        ),
        (["table", "RECIPE", "--size", "512"], "--size is '512'; give height and width"),
        (["table", "RECIPE", "data.train.0.dataset=absent"], "or set the number of classes: model.num_classes=80"),
        (["layers"], "analyze layers takes one recipe and at most one data set"),
        (["layers", "RECIPE", "train", "absent"], "analyze layers takes one recipe and at most one data set"),
        (["layers", "RECIPE", "other"], "no data set 'other' under `datasets` (known: train, absent)"),
        (["attention", "RECIPE"], "has no checkpoint; train first"),
    ],
)
def test_analyze_errors_print_one_message(capsys, folder, words, expected):
    status, _, err = run(capsys, "analyze", *[folder / "recipe.yaml" if word == "RECIPE" else word for word in words])
    assert status == 2
    assert expected in err
    assert "Traceback" not in err
