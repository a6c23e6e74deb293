"""Tests that a recipe with many mistakes is rejected with one message before anything starts."""

import pytest

from m2f.cluster.cli import main
from m2f.cluster.recipe.load import load_recipe
from m2f.model.errors import ConfigError

RECIPE = """
name: wrong
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}], augment: {kind: lsj, size: -5}}
model: {backbone: {name: resnet500}, pixel_std: [0, 0, 0]}
training:
  max_steps: 10
  global_batch: 0
  optimizer: {lr: .inf, betas: [1.5, 0.999]}
  schedule: {kind: multi_step, milestones: [8, 4]}
"""
PROBLEMS = [
    "data.augment.size is -5; it must be at least 1",
    "model.pixel_std is [0.0, 0.0, 0.0]; each must be above 0",
    "training.global_batch is 0; it must be at least 1",
    "training.optimizer.lr is inf; it must be finite, above 0",
    "training.optimizer.betas is [1.5, 0.999]; each must be at least 0 and below 1",
    "training.schedule.milestones is [8, 4]; each must be larger than the previous one",
    "`model.backbone.name` is 'resnet500', which timm does not have; did you mean resnet50, ",
]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_all_problems_are_in_one_message_and_nothing_starts(recipe, capsys):
    assert main(["train", str(recipe), "--launcher", "local"]) == 2
    output = capsys.readouterr().err
    assert f"{len(PROBLEMS)} problems" in output
    assert [problem for problem in PROBLEMS if problem not in output] == []
    assert list(recipe.parent.iterdir()) == [recipe]


def test_unknown_pretrained_name_of_swin_is_rejected_with_a_suggestion(recipe):
    recipe.write_text(
        RECIPE[: RECIPE.index("data:")]
        + "data: {train: [{dataset: train}]}\ntraining: {max_steps: 1}\n"
        + "model: {backbone: {kind: swin, pretrained: swin_tinny_patch4_window7_224}}\n"
    )
    with pytest.raises(
        ConfigError, match=r"`model\.backbone\.pretrained` .* did you mean swin_tiny_patch4_window7_224"
    ):
        load_recipe(recipe)
