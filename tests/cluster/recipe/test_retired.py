from __future__ import annotations

import logging

import pytest

from m2f.cluster.recipe import load
from m2f.cluster.recipe.load import dump_recipe, load_recipe, parse_recipe
from m2f.cluster.recipe.retired import RENAMED, RETIRED, Renamed, Retired, apply_renames, drop_retired, renamed_path
from m2f.cluster.recipe.same_model import model_changes
from m2f.model.errors import ConfigError

RECIPE = """
name: first
datasets:
  train: {shards: shards/train}
data:
  train: [{dataset: train}]
training: {max_steps: 10}
"""


def retired_tree(path: str, value: object) -> object:
    """Return a tree with `value` at `path`. Each `*` in the path becomes a list of one item."""
    for key in reversed(path.split(".")):
        value = [value] if key == "*" else {key: value}
    return value


@pytest.mark.parametrize("setting", RETIRED, ids=lambda setting: setting.path)
def test_retired_setting_is_dropped_at_its_default_and_rejected_otherwise(setting):
    problems: list[str] = []
    drop_retired(retired_tree(setting.path, setting.default), problems)
    assert problems == []
    drop_retired(retired_tree(setting.path, "something else"), problems)
    (problem,) = problems
    assert setting.path.replace("*", "0") in problem
    assert "'something else'" in problem
    assert problem.endswith(setting.remedy)


PATHS = [setting.path for setting in (*RETIRED, *RENAMED) if "*" not in setting.path]


@pytest.mark.parametrize("path", PATHS)
def test_retired_setting_does_not_exist_in_this_version(path):
    problems: list[str] = []
    load._build(load.RunConfig, retired_tree(path, None), "", problems)
    assert [problem for problem in problems if problem.startswith(f"`{path}`: no such setting")]


def test_a_recipe_with_a_retired_setting_at_its_default_equals_one_without():
    stored = RECIPE.replace("data:\n", "data:\n  augment_on: cpu\n")
    assert parse_recipe(stored) == parse_recipe(RECIPE)
    assert parse_recipe(RECIPE, ["data.augment_on=cpu"]) == parse_recipe(RECIPE)
    assert "augment_on" not in dump_recipe(parse_recipe(stored))


def test_retired_setting_is_reported_together_with_other_problems():
    with pytest.raises(ConfigError) as caught:
        parse_recipe(RECIPE.replace("data:\n", "data:\n  augment_on: device\n"), ["sed=1"], source="r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: 2 problems\n")
    assert "`data.augment_on` is 'device', but this version has no such setting; remove it" in message
    assert "`sed`: no such setting" in message


def test_star_matches_every_name_and_every_index():
    tree = {"sets": [{"old": 1, "kept": 2}, {"old": 3}, "no section"], "named": {"a": {"old": 1}, "b": None}}
    problems: list[str] = []
    drop_retired(tree, problems, [Retired("sets.*.old", 1, "drop it"), Retired("named.*.old", 1, "drop it")])
    assert tree == {"sets": [{"kept": 2}, {}, "no section"], "named": {"a": {}, "b": None}}
    assert [problem.partition(" is ")[0] for problem in problems] == ["`sets.1.old`"]


def test_renamed_setting_is_applied_with_a_hint():
    renames = [Renamed("a.*.old", "new")]
    tree = {"a": [{"old": 1}, {"old": 2, "new": 3}]}
    problems: list[str] = []
    (hint,) = apply_renames(tree, problems, renames)
    assert hint.startswith("`a.0.old` is now called `new`")
    assert tree == {"a": [{"new": 1}, {"new": 3}]}
    assert [problem.partition(" is ")[0] for problem in problems] == ["`a.1.old`"]
    assert renamed_path("a.0.old.deep", renames) == "a.0.new.deep"
    assert renamed_path("b.0.old", renames) == "b.0.old"


@pytest.fixture
def rename_of_seed(monkeypatch):
    """Simulate that `seed` was called `random_seed` in the previous version."""
    table = (Renamed("random_seed", "seed"),)
    monkeypatch.setattr(load, "apply_renames", lambda tree, problems: apply_renames(tree, problems, table))
    monkeypatch.setattr(load, "renamed_path", lambda path: renamed_path(path, table))


def test_rename_hint_is_logged_for_user_recipes_only(rename_of_seed, tmp_path, caplog):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + "random_seed: 4\n")
    with caplog.at_level(logging.WARNING):
        assert parse_recipe(path.read_text()).seed == 4
        assert caplog.messages == []
        assert load_recipe(path).seed == 4
    (message,) = caplog.messages
    assert message.startswith(f"{path}: `random_seed` is now called `seed`")
    assert load_recipe(path, ["seed=5"]).seed == 5
    assert load_recipe(path, ["random_seed=6"]).seed == 6


def test_weights_with_retired_setting_are_compared_at_its_default_and_rejected_otherwise():
    recipe = dump_recipe(parse_recipe(RECIPE))
    assert model_changes(recipe.replace("data:\n", "data:\n  augment_on: cpu\n"), recipe) == ()
    with pytest.raises(ConfigError, match=r"data\.augment_on"):
        model_changes(recipe.replace("data:\n", "data:\n  augment_on: device\n"), recipe)


def test_freeze_changes_the_optimizer_state_but_not_the_weights():
    free, frozen = (dump_recipe(parse_recipe(RECIPE, overrides)) for overrides in ((), ("model.freeze=[backbone]",)))
    older = free.replace("  freeze: []\n", "")
    assert older != free
    for before in (free, older):
        assert model_changes(before, frozen) == ()
        assert model_changes(before, frozen, optimizer=True) == ("model.freeze: [] -> ['backbone']",)
    assert model_changes(older, free, optimizer=True) == ()


def test_enabling_pilots_changes_the_optimizer_state():
    settings = (), ("model.pilots.max_targets=100",), ("model.pilots={max_targets: 50, label_noise: 0.1}",)
    without, some, fewer = (dump_recipe(parse_recipe(RECIPE, overrides)) for overrides in settings)
    older = without.replace("  pilots:\n    max_targets: 0\n    label_noise: 0.2\n    mask_noise: 0.0\n", "")
    assert older != without
    for before in (without, older):
        assert model_changes(before, some) == ()
        assert model_changes(before, some, optimizer=True) == ("model.pilots.max_targets: 0 -> above 0",)
        assert model_changes(before, without, optimizer=True) == ()
    assert model_changes(some, fewer, optimizer=True) == ()


def test_a_list_is_compared_as_one_value():
    decoder = "model:\n  transformer_decoder: {kind: pmt, num_layers: 4, levels: LEVELS, annealing: STEPS}\n"

    def recipe(levels: str, steps: str = "null") -> str:
        return decoder.replace("LEVELS", levels).replace("STEPS", steps)

    changed = "model.transformer_decoder.levels"
    assert model_changes(recipe("null"), recipe("[2, 5]")) == (f"{changed}: None -> [2, 5]",)
    assert model_changes(recipe("[2, 5]"), recipe("[2, 5, 11]")) == (f"{changed}: [2, 5] -> [2, 5, 11]",)
    assert model_changes(recipe("null", "[[0, 10]]"), recipe("null", "[[0, 20]]"), optimizer=True) == ()


OLDER = """
name: first
storage: {max_attempts: 8}
datasets:
  train: {shards: "s3://box/train"}
data:
  train: [{dataset: train}]
training: {max_steps: 10, collective_timeout_s: 600.0, stall_timeout_s: 300.0}
"""
"""A recipe of a version without `storage.patience_s`."""


def test_collective_timeout_of_an_older_recipe_is_raised_with_one_message(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text(OLDER)
    with caplog.at_level(logging.WARNING):
        assert load_recipe(path).training.collective_timeout_s == 1200
    (line,) = caplog.messages
    assert "`training.collective_timeout_s` is raised from 600 to 1200, so that it exceeds storage.patience_s" in line
    assert parse_recipe(OLDER.replace("600.0", "5000")).training.collective_timeout_s == 5000


def test_collective_timeout_below_patience_is_rejected_only_for_s3():
    today = OLDER.replace("storage: {max_attempts: 8}", "")
    with pytest.raises(ConfigError, match=r"collective_timeout_s is 600, but one rank may wait 900 s for S3"):
        parse_recipe(today)
    assert parse_recipe(today, ["training.collective_timeout_s=901"]).storage.patience_s == 600
    assert parse_recipe(today, ["datasets.train.shards=shards"]).training.collective_timeout_s == 600
