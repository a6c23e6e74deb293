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
    "training.schedule.milestones is [8, 4]; each must be at least 1 and larger than the previous one",
    "`model.backbone.name` is 'resnet500', which timm does not have; did you mean resnet50, ",
]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_checks_across_settings_run_beside_invalid_settings_that_they_do_not_read(recipe):
    schedule = "training.schedule={kind: multi_step, milestones: [8, -4], warmup_steps: -1}"
    scales = ["data.augment.min_scale=2", "data.augment.max_scale=1"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [schedule, *scales, "training.optimizer={lr: -1}", "training.max_steps=0"])
    for problem in (
        "data.augment.size is -5",
        "data.augment.min_scale is 2, above max_scale, which is 1",
        "training.schedule.warmup_steps is -1",
        "training.schedule.milestones is [8, -4]; each must be at least 1 and larger than the previous one",
        "neither training.max_steps nor training.max_epochs is set",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, ["data.augment.min_scale=0", "data.augment.max_scale=-1", "training.max_steps=-1"])
    assert "above max_scale" not in str(caught.value)
    assert "neither" not in str(caught.value)


def test_all_problems_are_in_one_message_and_nothing_starts(recipe, capsys):
    assert main(["train", str(recipe), "--launcher", "local"]) == 2
    output = capsys.readouterr().err
    assert f"{len(PROBLEMS)} problems" in output
    assert [problem for problem in PROBLEMS if problem not in output] == []
    assert list(recipe.parent.iterdir()) == [recipe]


def test_problems_between_sections_are_reported_with_those_inside_sections(recipe):
    names = {"'trian'": "data.train: no data set", "'vla'": "evaluation.sets: no data set", "'x y'": "name is"}
    words = ["data.train=[{dataset: trian}]", "evaluation.sets=[{dataset: vla}]", "name=x y"]
    with pytest.raises(ConfigError, match=f"{len(PROBLEMS) + 2} problems") as caught:  # `data` has another problem
        load_recipe(recipe, words)
    assert [name for name in names if f"{names[name]} {name}" in str(caught.value)] == ["'vla'", "'x y'"]
    words += ["data.augment.size=8", "training={max_steps: 1, early_stopping: {metric: foo}}"]
    with pytest.raises(ConfigError, match="no data set 'trian'") as caught:
        load_recipe(recipe, words, for_training=True)
    assert "training.early_stopping.metric is 'foo', but evaluation.sets has no such set" in str(caught.value)
    assert "6 problems" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("val/PQQ", "which the evaluation of val (tasks: panoptic, semantic) lacks; did you mean `val/PQ`?"),
        ("val/xyz", "known: PQ, SQ, RQ, PQ_th, "),
        ("val/AP", "known: PQ, "),
        ("val/PQ_small", None),
        ("val/mIoU_occurring", None),
        ("val/boundary_PQ_st", None),
        ("things/AP75", None),
        ("things/box_APs", None),
        ("things/PQ", "which the evaluation of things (tasks: instance) lacks"),
    ],
)
def test_metrics_that_training_uses_must_be_computed(recipe, metric, problem):
    recipe.write_text(
        "name: right\ndatasets: {train: {shards: shards/train}}\ndata: {train: [{dataset: train}]}\n"
        "training: {max_steps: 1}\n"
        "evaluation: {tasks: [panoptic, semantic], extra_metrics: [boundary, box], sets: [{dataset: train, name: val}, "
        "{dataset: train, name: things, tasks: [instance]}]}\n"
    )
    override = f"training.checkpoint.best_metric={metric}"
    assert load_recipe(recipe, [override]).training.checkpoint.best_metric == metric  # `m2f eval` uses no metric
    if problem is None:
        load_recipe(recipe, [override], for_training=True)
        return
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [override], for_training=True)
    assert f"training.checkpoint.best_metric is '{metric}'" in str(caught.value)
    assert problem in str(caught.value)


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
