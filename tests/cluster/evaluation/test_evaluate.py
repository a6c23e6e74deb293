"""Tests of the results and files of evaluations, with an actor that runs in this process."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f.cluster import ray_cluster
from m2f.cluster.evaluation import offline
from m2f.cluster.evaluation.actor import EvaluationActor
from m2f.cluster.evaluation.evaluate import evaluate_sets, results_name, write_files
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import WholeImage
from m2f.eval.report.panels import decode_picture
from m2f.eval.results.images import read_image_records
from m2f.model.mask2former import build_model
from m2f.trainer.checkpoint.folder import CheckpointManifest, file_entry

RECIPE = """
name: small
output: {folder}/runs
datasets:
  val: {{shards: {folder}/shards}}
data:
  train: [{{dataset: val}}]
model:
  num_classes: {classes}
  backbone: {{name: resnet10t, norm: group, options: {{channels: [16, 16, 32, 32]}}}}
  pixel_decoder: {{conv_dim: 32, mask_dim: 32, num_layers: 1, num_heads: 2, feedforward_dim: 32}}
  transformer_decoder: {{num_queries: 8, num_layers: 1, hidden_dim: 32, num_heads: 2, feedforward_dim: 32}}
  postprocess: {{object_threshold: 0.0, overlap_threshold: 0.0}}
training: {{max_steps: 10}}
evaluation:
  sets:
    - {{dataset: val}}
    - {{dataset: val, name: val_start, limit: 3}}
    - dataset: val
      name: val_ms
      limit: 2
      tasks: [semantic]
      test_time: {{kind: multi_scale, shortest_edges: [48, 64], max_size: 128}}
  extra_metrics: [boundary, box, class_agnostic]
  tasks: [panoptic, instance, semantic]
  shortest_edge: 64
  max_size: 96
  panels: 4
"""


class InProcessPool:
    """Fake pool that calls one actor directly and records its calls."""

    def __init__(self, config):
        self.actor = EvaluationActor(config)
        self.calls = []

    def run(self, task, batches, on_result):
        self.calls.append((task, list(batches)))
        for batch in reversed(batches):
            on_result(batch, self.actor.evaluate(task, batch))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPUs of this machine
    dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=SyntheticSource(num_images=10))
    reader = open_reader(dataset.source)
    write_dataset(reader, dataset, Storage())
    config = parse_recipe(RECIPE.format(folder=tmp_path, classes=len(reader.categories.for_task("panoptic"))))
    torch.manual_seed(0)
    save_file(build_model(config.model, pretrained_backbone=False).state_dict(), tmp_path / "weights.safetensors")
    return config, str(tmp_path / "weights.safetensors")


def test_result_files_contain_panels_worst_images_tables_and_report(small):
    config, weights = small
    pool = InProcessPool(config)
    whole, subset, scaled = evaluate_sets(config, pool, weights, 7, lambda *_: None)
    files = whole.files()
    written = {"results.json", "results.txt", "details.json", "report.html", "panels.jpg", "worst.jpg"}
    assert set(files) == written | {"images.parquet"}
    assert len(whole.panels) == 4
    assert len(whole.worst) == 2
    assert decode_picture(files["worst.jpg"]).shape[1] > 1000
    assert b"Subset: first 3 of 10" in subset.files()["report.html"]
    assert files["report.html"].count(b"<img") == 6
    assert whole.results.headline("val").keys() >= {"val/boundary_PQ", "val/box_AP", "val/class_agnostic_AR100"}
    assert scaled.results.table().startswith("val_ms: 2 images, SUBSET (first 2 of 10), 2 scales, flipped too")
    assert set(scaled.results.metrics()) == {name for name in whole.results.metrics() if "IoU" in name or "ACC" in name}

    evaluation, drawing = pool.calls[:2]
    assert evaluation[1] == [0, 1]
    assert drawing[1] == [0, 1]
    again = evaluate_sets(config, InProcessPool(config), weights, 7, lambda *_: None)[0]
    assert again.files() == files
    errors = json.loads(files["details.json"])["segments"]
    images = read_image_records(files["images.parquet"])
    resampled_metrics = images.resampled(np.ones((10, 1), dtype=np.int32))
    metrics = whole.results.metrics()
    assert {name: float(value[0]) for name, value in resampled_metrics.items()} == pytest.approx(
        {name: metrics[name] for name in ("PQ", "AP", "mIoU")}, abs=1e-10
    )
    found = sum(row["found"] for row in errors["by_class"].values())
    assert found == errors["outcomes"]["found"] == sum(r["TP"] for r in json.loads(files["results.json"])["per_class"])


def test_step_committed_again_is_evaluated_with_its_new_weights(small, tmp_path):
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, sets=config.evaluation.sets[:1], panels=0))
    checkpoint = tmp_path / "step_00000007-1"
    checkpoint.mkdir()
    pool, files = InProcessPool(config), []
    for factor in (1.0, -1.0):
        committed = {name: tensor * factor for name, tensor in load_file(weights).items()}
        save_file(committed, checkpoint / "weights.safetensors")
        entries = {"weights.safetensors": file_entry(checkpoint / "weights.safetensors")}
        (checkpoint / "manifest.json").write_bytes(CheckpointManifest(7, 1, 1, entries).to_json())
        (evaluation,) = evaluate_sets(config, pool, str(checkpoint), 7, lambda *_: None)
        files.append(evaluation.files())
    (expected,) = evaluate_sets(config, InProcessPool(config), str(checkpoint), 7, lambda *_: None)
    assert files[1] == expected.files()
    assert files[1]["images.parquet"] != files[0]["images.parquet"]


def test_results_name_the_digest_of_weights_without_a_manifest(small):
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, sets=config.evaluation.sets[1:2], panels=0))
    digests = []
    for factor in (1.0, -1.0):
        save_file({name: tensor * factor for name, tensor in load_file(weights).items()}, weights)
        (evaluation,) = evaluate_sets(config, InProcessPool(config), weights, None, lambda *_: None)
        digests.append(evaluation.results.subject.settings.weights)
    assert digests[1] == file_entry(Path(weights)).sha256 != digests[0]


def test_panels_0_writes_no_pictures(small):
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, panels=0))
    pool = InProcessPool(config)
    whole, *_ = evaluate_sets(config, pool, weights, None, lambda *_: None)
    assert not {"panels.jpg", "worst.jpg"} & set(whole.files())
    assert [task.panel_rows for task, _ in pool.calls] == [(), (), ()]


def test_few_images_are_evaluated_without_ray(small, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_cluster, "existing_or_local_cluster", refuse)
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, sets=config.evaluation.sets[:2]))
    found = offline.evaluate_checkpoint(config, weights)
    expected = evaluate_sets(config, InProcessPool(config), weights, None, lambda *_: None)
    assert [one.files() for one in found] == [one.files() for one in expected]
    monkeypatch.setattr(offline, "MAX_LOCAL_IMAGES", 12)  # the two sets have 13 images
    with pytest.raises(AssertionError, match="Ray was started"):
        offline.evaluate_checkpoint(config, weights)


def test_batch_size_changes_metrics_only_by_rounding(small):
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, sets=config.evaluation.sets[:1], panels=0))
    results = []
    for batch_size in (1, 4):
        sized = replace(config, evaluation=replace(config.evaluation, batch_size=batch_size))
        (evaluated,) = evaluate_sets(sized, InProcessPool(sized), weights, 7, lambda *_: None)
        results.append(evaluated.results.headline())
    assert len(results[0]) > 20
    assert results[1] == pytest.approx(results[0], abs=0.05)


def test_full_local_disk_keeps_results_out_of_mlflow_and_in_the_bucket(tmp_path, monkeypatch, caplog):
    stored = {}
    monkeypatch.setattr(Storage, "put", lambda storage, url, data: stored.update({url: data}))
    files = {"results.json": b"1", "images.parquet": b"2"}
    folder = write_files(Storage(), "s3://b/val", files, local=tmp_path / "copy")
    assert folder is not None
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files

    def fill(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert write_files(Storage(), "s3://b/val", files, local=tmp_path / "copy") is None
    assert stored == {f"s3://b/val/{name}": data for name, data in files.items()}
    assert not (tmp_path / "copy").exists()
    assert "s3://b/val: these results are not copied to MLflow ([Errno 28] No space left on device)" in caplog.text


def test_results_with_other_settings_weights_or_data_get_a_separate_name(small, tmp_path):
    config, weights = small
    config = replace(config, evaluation=replace(config.evaluation, sets=config.evaluation.sets[:1], panels=0))

    def evaluate(**settings):
        changed = replace(config, evaluation=replace(config.evaluation, **settings))
        return evaluate_sets(changed, InProcessPool(changed), weights, 7, lambda *_: None)[0]

    storage, folder = Storage(), str(tmp_path / "evaluations")
    published, same, larger = evaluate(), evaluate(actors=3), evaluate(shortest_edge=80)
    assert results_name(storage, folder, published.results) == "val"
    write_files(storage, f"{folder}/val", published.files(), local=tmp_path)
    assert results_name(storage, folder, same.results) == "val"
    assert same.files() == published.files()
    digest = larger.results.subject.settings.digest
    assert results_name(storage, folder, larger.results) == f"val.{digest}"
    stored = json.loads((tmp_path / "evaluations/val/results.json").read_text())
    assert stored["settings"]["shortest_edge"] == 64
    square = evaluate(test_time=WholeImage(square=True))
    assert results_name(storage, folder, square.results) == f"val.{square.results.subject.settings.digest}"
    assert square.results.subject.settings.test_time == {"kind": "whole", "square": True}
    assert square.results.metrics() != published.results.metrics()
    other = replace(published.results.subject.settings, weights="0" * 64)
    subject = replace(published.results.subject, settings=other)
    assert results_name(storage, folder, replace(published.results, subject=subject)) == f"val.{other.digest}"

    for one in (published, larger):
        subject = replace(one.results.subject, fingerprint="0123456789abcdef")
        name = f"val.{subject.settings.digest}.01234567"
        assert results_name(storage, folder, replace(one.results, subject=subject)) == name

    del stored["settings_digest"]  # version 0.1 did not write it
    (tmp_path / "evaluations/val/results.json").write_text(json.dumps(stored))
    assert results_name(storage, folder, same.results) == "val"
    assert results_name(storage, folder, larger.results) == f"val.{digest}"
    for damaged in ("", "[1]", "[" * 200_000):
        (tmp_path / "evaluations/val/results.json").write_text(damaged)
        assert results_name(storage, folder, same.results) == f"val.{same.results.subject.settings.digest}"
