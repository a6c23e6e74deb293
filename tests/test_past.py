"""Tests that files written by commit 451e9d8 can be resumed, evaluated, exported and compared by the current code.

`tests/past/451e9d8` holds shards, a run of two ranks that was stopped after step 1241, its MLflow database, an
evaluation with dumps and an exported model. Its `make.sh` describes how they were made.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from m2f.cluster.cli import main
from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.recipe.stored import store_recipe
from m2f.cluster.start.settling import local_devices, settled_run
from m2f.data_pipeline.storage.storage import Storage

PAST = Path(__file__).parent / "past" / "451e9d8"
ORIGINAL_FOLDER = "/tmp/m2f-past"  # files of the run contain absolute paths below this folder
STEP = 1241
LOSSES = {1242: 7.62991, 1243: 6.34603, 1244: 8.54128}
"""Losses by step when 451e9d8 itself continued the run in the same way."""
RESULTS = f"evaluations/step_{STEP:08d}/val/results.json"


@pytest.fixture
def past(tmp_path, monkeypatch):
    """Copy the folder, and adapt the absolute paths in its files."""
    folder = tmp_path / "past"
    shutil.copytree(PAST, folder)
    for path in (folder / "runs").rglob("*"):
        if path.suffix in (".json", ".yaml") and "checkpoints" not in path.parts:
            path.write_text(path.read_text().replace(ORIGINAL_FOLDER, str(folder)))
    database = folder / "runs/past/mlflow.db"
    database.write_bytes(gzip.decompress(Path(f"{database}.gz").read_bytes()))
    with sqlite3.connect(database) as connection:
        for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (ORIGINAL_FOLDER, str(folder)))
    connection.close()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def points(past: Path, name: str) -> dict[int, float]:
    run_id = json.loads((past / "runs/past/tracking.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{past}/runs/past/mlflow.db")
    history = client.get_metric_history(run_id, name)
    assert len({point.step for point in history}) == len(history), "a step has two points"
    return {point.step: point.value for point in history}


def test_continuing_an_old_run_lists_only_the_settings_that_changed(past):
    def changes(*overrides: str) -> tuple[str, ...]:
        config = settled_run(load_recipe("recipe.yaml", overrides), local_devices(), during_training=False)
        new_default, *others = store_recipe(Storage(), config, has_progress=True)
        assert new_default == "evaluation.cuda_graphs: False -> True"
        return tuple(others)

    assert changes() == ()
    assert changes("training.max_steps=5000") == ("training.max_steps: 4000 -> 5000",)
    assert changes("training.collective_timeout_s=90") == ("training.collective_timeout_s: 60.0 -> 90.0",)
    windows = changes("evaluation.tasks=[semantic]", "evaluation.sets.0.test_time={kind: multi_scale}")
    assert "evaluation.sets.0.test_time.kind: not set -> multi_scale" in windows


@pytest.mark.slow
def test_old_run_resumes_from_its_checkpoint(past, capfd):
    words = ["recipe.yaml", "--launcher", "local", f"training.max_steps={STEP + 3}", "training.log_every_steps=1"]
    assert main(["train", *words]) == 0
    assert f"from {past}/runs/past/checkpoints/step_{STEP:08d}" in capfd.readouterr().out
    losses = points(past, "train/loss/total")
    assert {step: losses[step] for step in losses if step > STEP} == pytest.approx(LOSSES, rel=1e-3)
    assert min(losses) == 100  # points that were logged before are kept
    assert (past / f"runs/past/checkpoints/step_{STEP + 3:08d}-1/manifest.json").is_file()


@pytest.mark.slow
def test_old_run_resumes_with_a_different_number_of_ranks(past, capfd):
    words = [f"training.max_steps={STEP + 2}", "training.log_every_steps=1", "cluster.num_workers=1"]
    assert main(["train", "recipe.yaml", "--launcher", "local", *words]) == 0
    assert f"from {past}/runs/past/checkpoints/step_{STEP:08d}" in capfd.readouterr().out
    losses = points(past, "train/loss/total")
    assert [losses[STEP + 1], losses[STEP + 2]] == pytest.approx([LOSSES[STEP + 1], LOSSES[STEP + 2]], rel=1e-3)


@pytest.mark.slow
@pytest.mark.cluster
def test_old_checkpoint_evaluates_to_the_same_results(past):
    old = json.loads((PAST / "runs/past" / RESULTS).read_text())
    assert main(["eval", "recipe.yaml", "--output", "again", "--dump", "dumps_again"]) == 0
    new = json.loads((past / "again/val/results.json").read_text())
    undefined = {name for name, value in old["metrics"].items() if value is None}
    assert {name for name in old["metrics"] if new["metrics"][name] is None} == undefined  # new metrics may be added
    for name in old["metrics"].keys() - undefined:
        assert new["metrics"][name] == pytest.approx(old["metrics"][name], rel=1e-3), name
    written = {path.name for path in (past / "dumps_again/val").iterdir()}
    assert written >= {path.name for path in (past / "dumps/val").iterdir()}  # new files may be added


def test_old_checkpoint_exports_the_same_graph(past):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", "recipe.yaml", "--format", "onnx", "--size", "64", "64", "--output", "again.onnx"]) == 0
    images = np.random.default_rng(0).uniform(-2, 2, (1, 3, 64, 64)).astype(np.float32)

    def outputs(model: bytes) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(model)
        return session.run(None, {session.get_inputs()[0].name: images})

    old_outputs = outputs(gzip.decompress((past / "exported/model.onnx.gz").read_bytes()))
    for old, new in zip(old_outputs, outputs((past / "again.onnx").read_bytes()), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_old_runs_can_be_compared(past, capsys):
    shutil.copytree(past / "runs/past", past / "runs/other")
    assert main(["compare", "runs/past", "runs/other"]) == 0
    table = capsys.readouterr().out
    metrics = json.loads((PAST / "runs/past" / RESULTS).read_text())["metrics"]
    assert f"{100 * metrics['PQ']:.2f}" in table or f"{metrics['PQ']:.2f}" in table


def test_old_shards_and_checkpoints_pass_verification(past, capsys):
    assert main(["verify", "shards/train", "--full"]) == 0
    assert main(["checkpoint", "verify", "recipe.yaml"]) == 0
    assert main(["stats", "recipe.yaml"]) == 0
    with tarfile.open("shards/val/shards/00000.tar") as shard:
        shard.extract("synthetic-1-000000.img.jpg", filter="data")
    assert main(["predict", "runs/past", "synthetic-1-000000.img.jpg", "--output", "predicted"]) == 0
    assert str(STEP) in capsys.readouterr().out
