"""Tests of the checkpoint that `--checkpoint` selects, and of the run name that `m2f train --fresh` uses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from m2f.cluster.evaluation.queue import Entry, queue_url
from m2f.cluster.predict import choose_checkpoint as module
from m2f.cluster.predict.choose_checkpoint import choose_checkpoint, open_recipe, recipe_of
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe, parse_recipe
from m2f.cluster.recipe.stored import unused_name
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.reporting import CommittedCheckpoint

RECIPE = """
name: run
datasets: {train: {shards: shards}}
data: {train: [{dataset: train}]}
training: {max_steps: 3}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return the configuration of a run with checkpoints of steps 1 to 3."""
    config = parse_recipe(RECIPE, [f"output={tmp_path}"])
    checkpoints = tuple(CommittedCheckpoint(step, f"{config.run_folder}/step_{step}") for step in (3, 2, 1))
    monkeypatch.setattr(module, "list_checkpoints", lambda storage, folder: checkpoints)
    return config


def publish(config: RunConfig, *metrics: dict[str, float], status: str = "published") -> None:
    entries = [Entry(step, "", 0, status, metrics=m) for step, m in enumerate(metrics, 1)]  # type: ignore[arg-type]
    Storage().put(queue_url(config), json.dumps([asdict(entry) for entry in entries]).encode())


@pytest.mark.parametrize(("choice", "step"), [(None, 3), ("last", 3), ("2", 2), ("best", 1)])
def test_a_checkpoint_is_chosen_by_step_or_word(config, choice, step):
    publish(config, {"val/PQ": 51.0, "val/AP": 20.0}, {"val/PQ": 50.0, "val/AP": 30.0})
    assert choose_checkpoint(config, Storage(), choice).step == step


def test_weights_are_named_by_their_file_or_whole_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"exports/a": "a", "exports/v1.2": "v1.2", "step_00000001": "weights_step_00000001"}
    for path in names:
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "model_final.pth").touch()
    names |= {"exports/a/": "a", "exports/a/..": "exports"}
    names |= {"model_final.pth": "model_final", "s3://bucket/x/model.safetensors": "model"}
    assert {path: choose_checkpoint(config, Storage(), path).name for path in names} == names
    assert choose_checkpoint(config, Storage(), "1").name == "step_00000001"


def test_best_checkpoint_uses_the_metric_of_the_recipe(config):
    publish(config, {"val/PQ": 51.0, "val/AP": 20.0}, {"val/PQ": 50.0, "val/AP": 30.0})
    config = parse_recipe(RECIPE, [f"output={config.output}", "training.checkpoint.best_metric=val/AP"])
    assert choose_checkpoint(config, Storage(), "best").step == 2


def test_run_has_the_recipe_that_the_chosen_checkpoint_was_trained_with(tmp_path):
    first, moved = parse_recipe(RECIPE, [f"output={tmp_path / 'old'}"]), tmp_path / "new" / "moved"
    moved.mkdir(parents=True)
    (moved / "recipe.yaml").write_text(dump_recipe(first))
    assert open_recipe(str(moved), ())[0].training.max_steps == 3
    resumed = ["training.max_steps=9", "training.checkpoint.best_metric=val/AP"]
    for step, overrides in ((1, ()), (2, ["training.max_steps=6"]), (3, resumed)):
        folder = moved / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        (folder / "recipe.yaml").write_text(dump_recipe(parse_recipe(RECIPE, [f"output={first.output}", *overrides])))
    config, _ = open_recipe(str(moved), ())
    publish(config, {"val/PQ": 51.0, "val/AP": 20.0}, {"val/PQ": 50.0, "val/AP": 30.0})
    for choice, step, length in ((None, 3, 9), ("1", 1, 3), ("best", 2, 6)):
        weights = choose_checkpoint(config, Storage(), choice)
        own = recipe_of(weights, str(moved), ["seed=7"], config)
        assert (weights.step, own.training.max_steps, own.seed, own.run_folder) == (step, length, 7, str(moved))
    (moved / "checkpoints" / "step_00000003" / "recipe.yaml").unlink()
    assert open_recipe(str(moved), ())[0].training.max_steps == 6


def test_best_checkpoint_is_one_that_was_not_deleted(config, monkeypatch):
    publish(config, {"val/PQ": 51.0}, {"val/PQ": 49.0}, {"val/PQ": 48.0})
    newest = module.list_checkpoints(Storage(), config.run_folder)[:2]
    monkeypatch.setattr(module, "list_checkpoints", lambda storage, folder: newest)
    assert choose_checkpoint(config, Storage(), "best").step == 2
    publish(config, {"val/PQ": 51.0})
    with pytest.raises(ConfigError, match="--checkpoint best: the evaluated checkpoints were deleted in"):
        choose_checkpoint(config, Storage(), "best")


def test_best_checkpoint_without_evaluations_is_an_error_with_a_remedy(config):
    with pytest.raises(ConfigError, match=r"--checkpoint best: no evaluation is published in .*; give `last` or"):
        choose_checkpoint(config, Storage(), "best")
    publish(config, {"val/PQ": 51.0}, status="withdrawn")
    with pytest.raises(ConfigError, match="no evaluation is published"):
        choose_checkpoint(config, Storage(), "best")


def test_fresh_run_uses_the_first_free_folder_name(tmp_path):
    config = parse_recipe(RECIPE, [f"output={tmp_path}"])
    assert unused_name(config) == "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(RECIPE)
    assert unused_name(config) == "run-3"


def test_hugging_face_folder_without_a_recipe_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"give a recipe, and --checkpoint {tmp_path}"):
        open_recipe(str(tmp_path), ())
