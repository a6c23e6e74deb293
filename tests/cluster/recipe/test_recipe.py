from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import AvailableDevices
from m2f.cluster.recipe.explain import explain
from m2f.cluster.recipe.load import dump_recipe, flatten, load_recipe, parse_recipe
from m2f.cluster.start.settling import settled_run
from m2f.data_pipeline.config import LargeScaleJitter, ShortestEdgeCrop
from m2f.data_pipeline.sources import CocoPanopticSource
from m2f.data_pipeline.urls import url_problem
from m2f.model.errors import ConfigError
from m2f.trainer.config import MultiStepSchedule, PolySchedule

RECIPE = """
name: first
datasets:
  train: {shards: shards/train, source: {kind: synthetic, num_images: 8}}
  val: {shards: shards/val}
data:
  train: [{dataset: train, weight: 2}]
training:
  max_steps: 10
  optimizer: {lr: 1e-4}
evaluation:
  sets: [{dataset: val}]
"""


def problems_of(text: str = RECIPE, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, overrides, source="r.yaml")
    return str(caught.value)


def test_recipe_with_defaults_loads_and_numbers_without_a_dot_are_numbers():
    config = parse_recipe(RECIPE)
    assert config.training.optimizer.lr == 1e-4
    assert config.data.train[0].weight == 2.0
    assert isinstance(config.data.augment, LargeScaleJitter)
    assert config.run_folder == "runs/first"


def test_override_of_a_data_set_named_by_a_number_keeps_its_other_settings():
    text = RECIPE.replace("datasets:", "datasets:\n  2017: {shards: s, seed: 3}", 1)
    dataset = parse_recipe(text, ["datasets.2017.shards=moved"]).datasets["2017"]
    assert (dataset.shards, dataset.seed) == ("moved", 3)


def test_overrides_reach_nested_sections_lists_and_absent_sections():
    config = parse_recipe(
        RECIPE,
        [
            "training.optimizer.lr=3e-5",
            "data.train.0.weight=5",
            "evaluation.sets.0.limit=4",
            "cluster.num_workers=2",
            "training.schedule.power=0.5",
            "model.backbone.options={channels: [8, 16]}",
            "training.optimizer.betas=[0.8, 0.9]",
            "name=second",
        ],
    )
    assert config.training.optimizer.lr == 3e-5
    assert config.data.train[0].weight == 5
    assert config.evaluation.sets[0].limit == 4
    assert config.cluster.num_workers == 2
    assert config.training.schedule == PolySchedule(power=0.5)
    assert config.model.backbone.options == {"channels": [8, 16]}
    assert config.training.optimizer.betas == (0.8, 0.9)
    assert config.name == "second"


def test_kind_selects_the_section_and_settings_of_another_kind_are_named():
    config = parse_recipe(
        RECIPE,
        [
            "training.schedule={kind: multi_step, milestones: [5, 8]}",
            "data.augment={kind: shortest_edge, shortest_edges: [32], max_size: 64, crop: [32, 32]}",
            "datasets.val.source={kind: coco_panoptic, images: i, panoptic_json: p, panoptic_masks: m}",
        ],
    )
    assert config.training.schedule == MultiStepSchedule(milestones=(5, 8))
    assert isinstance(config.data.augment, ShortestEdgeCrop)
    assert isinstance(config.datasets["val"].source, CocoPanopticSource)
    message = problems_of(RECIPE, "training.schedule={kind: multi_step, milestones: [5], power: 0.9}")
    assert "1 problem\n" in message
    assert "`training.schedule.power`: no such setting in MultiStepSchedule" in message


def test_every_problem_is_reported_at_once_with_its_path():
    message = problems_of(
        RECIPE,
        "training.optimiser.lr=1",
        "training.optimizer.lr=fast",
        "model.transformer_decoder.num_querys=50",
        "data.task=panoptik",
        "datasets.train.source.kind=synthetik",
        "training.max_steps=null",
        "data.train.7.weight=1",
        "nonsense",
        "cluster.num_workers=true",
    )
    assert message.startswith("r.yaml: 9 problems\n")
    for expected in (
        "`training.optimiser`: no such setting in TrainingConfig; did you mean `optimizer`?",
        "`training.optimizer.lr`: input should be a valid number",
        "(got 'fast')",
        "`model.transformer_decoder.num_querys`: no such setting in MaskedTransformerDecoderConfig; did you mean",
        "`data.task`: input should be 'panoptic', 'instance' or 'semantic'",
        "`datasets.train.source.kind`: no such kind 'synthetik'; did you mean `synthetic`?",
        "`training.max_steps`: input should be a valid integer",
        "`data.train` is a list of length 1; `7` is not a valid index",
        "`nonsense`: write an override as section.key=value",
        "`cluster.num_workers`: expected a number, got true",
    ):
        assert expected in message


def test_missing_keys_and_missing_kinds_are_named():
    message = problems_of("name: x\ndatasets: {a: {shards: s, source: {images: i}}}\ndata: {train: [{weight: 1}]}\n")
    assert "`datasets.a.source.kind` is missing; set it to one of synthetic, coco_panoptic" in message
    assert "`data.train.0.dataset` is missing" in message
    assert "`training` is missing; RunConfig requires it" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=0", "neither training.max_steps nor training.max_epochs is set"),
        ("data.train.0.dataset=other", "data.train: no data set 'other' under `datasets` (known: train, val)"),
        ("data.train=[]", "data.train is empty"),
        ("data.train=train", "`data.train`: expected a list, got the value 'train'"),
        ("training=5", "`training`: expected a section, got the value 5"),
        ("name.x=5", "`name` is the value 'first', not a section"),
        ("training.optimizer.betas=[0.9, x]", "`training.optimizer.betas.1`: input should be a valid number"),
        ("a.b={", "the value is not valid YAML"),
    ],
)
def test_one_mistake_gives_one_problem(override, expected):
    message = problems_of(RECIPE, override)
    assert expected in message
    assert message.startswith("r.yaml: 1 problem\n")
    assert "secret" not in message


def test_duplicate_key_is_rejected_with_both_lines():
    message = problems_of(RECIPE + "name: again\n")
    assert "`name` is written twice (lines 2 and 13)" in message


@pytest.mark.parametrize(
    ("text", "expected"), [("- a\n", "this is a list"), ("", "this is nothing"), ("a: [", "not valid YAML")]
)
def test_text_that_is_not_a_recipe_is_rejected(text, expected):
    assert expected in problems_of(text)


def test_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the recipe \(No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_the_dumped_recipe_loads_back_equal_and_complete():
    config = parse_recipe(RECIPE, ["training.schedule={kind: multi_step, milestones: [5, 8]}", "data.augment.size=64"])
    text = dump_recipe(config)
    assert parse_recipe(text) == config
    assert yaml.safe_load(text)["training"]["optimizer"]["eps"] == 1e-8


@given(lr=st.floats(1e-12, 1e3), steps=st.integers(1, 10**9), text=st.from_regex(r"[ -#%-~]{1,20}", fullmatch=True))
def test_dumping_and_loading_keeps_any_values(lr, steps, text):
    assume(url_problem(text) is None)
    config = parse_recipe(RECIPE)
    training = dataclasses.replace(
        config.training, max_steps=steps, optimizer=dataclasses.replace(config.training.optimizer, lr=lr)
    )
    tracking = dataclasses.replace(config.tracking, experiment=text)
    config = dataclasses.replace(config, training=training, tracking=tracking)
    assert parse_recipe(dump_recipe(config)) == config


def test_flatten_has_one_entry_per_setting():
    flat = flatten(parse_recipe(RECIPE))
    assert flat["data.train.0.dataset"] == "train"
    assert flat["training.optimizer.betas.1"] == "0.999"
    assert flat["datasets.val.source"] == "None"
    assert flat["model.backbone.options"] == "{}"


def test_explain_shows_types_defaults_and_docstrings():
    text = explain("training.schedule")
    assert "## training.schedule (kind: poly)" in text
    assert (
        "- `milestones` (tuple[int, ...], required, at least 1 and larger than the previous one, in steps): Steps"
        in text
    )
    assert "- `every_steps` (int, default 5000, at least 1, in steps)" in explain("training")


def test_explain_covers_every_section_of_the_whole_recipe():
    text = explain()
    for field in dataclasses.fields(RunConfig):
        assert f"- `{field.name}` (" in text
    assert "## datasets.source (kind: label_maps)" in text
    assert "`schedule` (ScheduleConfig, default kind poly)" in text


def test_explain_of_an_unknown_section_suggests_one():
    with pytest.raises(ConfigError, match="`optimiser` is not a section of `training`; did you mean `optimizer`"):
        explain("training.optimiser")


def test_environment_variables_in_texts_are_replaced(monkeypatch):
    monkeypatch.setenv("M2F_TEST_ROOT", "/mnt/sets")
    monkeypatch.delenv("M2F_TEST_NONE", raising=False)
    recipe = RECIPE.replace("shards/train", '"${M2F_TEST_ROOT}/train"').replace(
        "shards/val", '"${M2F_TEST_NONE:-here}/val"'
    )
    config = parse_recipe(recipe)
    assert config.datasets["train"].shards == "/mnt/sets/train"
    assert config.datasets["val"].shards == "here/val"


def test_an_unset_environment_variable_is_named_with_its_place(monkeypatch):
    monkeypatch.delenv("M2F_TEST_NONE", raising=False)
    message = problems_of(RECIPE.replace("shards/val", '"${M2F_TEST_NONE}/val"'))
    assert "`datasets.val.shards`: the environment variable M2F_TEST_NONE is not set" in message


def test_a_recipe_from_a_file_has_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "{kind: coco_instances, images: raw/images, instances_json: /mnt/instances.json}"
    recipe = RECIPE.replace("{kind: synthetic, num_images: 8}", source)
    (tmp_path / "r.yaml").write_text(recipe)
    config = load_recipe("r.yaml", ["datasets.val.shards=s3://bucket/val", "model.weights=w.safetensors"])
    assert config.output == f"{tmp_path}/runs"
    assert config.datasets["train"].shards == f"{tmp_path}/shards/train"
    assert config.datasets["val"].shards == "s3://bucket/val"
    assert config.datasets["train"].source.images == f"{tmp_path}/raw/images"
    assert config.datasets["train"].source.instances_json == "/mnt/instances.json"
    assert config.model.weights == f"{tmp_path}/w.safetensors"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.actors=0", "evaluation.actors is 0; it must be at least 1"),
        ("data.lanes=0", "data.lanes is 0; it must be at least 1"),
        ("datasets.train.shard_mb=0", "datasets.train.shard_mb is 0.0; it must be above 0"),
        ("training.optimizer.lr=-1", "training.optimizer.lr is -1.0; it must be above 0"),
        ("training.collective_timeout_s=0", "training.collective_timeout_s is 0.0; it must be above 0"),
        ("training.stall_timeout_s=-1", "training.stall_timeout_s is -1.0; it must be at least 0"),
        ("training.schedule.warmup_steps=-1", "training.schedule.warmup_steps is -1; it must be at least 0"),
        ("cluster.num_workers=0", "cluster.num_workers is 0; it must be at least 1"),
        ("model.transformer_decoder.num_queries=0", "model.transformer_decoder.num_queries is 0"),
        ("name=../../elsewhere", "name is '../../elsewhere'"),
    ],
)
def test_invalid_values_are_rejected(override, expected):
    assert expected in problems_of(RECIPE, override)


WRONG_NUMBERS = [
    ("data.augment.size=-5", "data.augment.size is -5; it must be at least 1"),
    ("datasets.train.seed=-1", "datasets.train.seed is -1; it must be at least 0"),
    ("training.optimizer.lr=.inf", "training.optimizer.lr is inf; it must be finite, above 0"),
    ("training.optimizer.weight_decay=.nan", "training.optimizer.weight_decay is nan; it must be finite, at least 0"),
    (
        "training.optimizer.betas=[1.5, 0.9]",
        "training.optimizer.betas is [1.5, 0.9]; each must be at least 0 and below 1",
    ),
    ("model.pixel_std=[1, 0, 1]", "model.pixel_std is [1.0, 0.0, 1.0]; each must be above 0"),
    ("model.pixel_mean=[1, .nan, 1]", "model.pixel_mean is [1.0, nan, 1.0]; each must be finite"),
    ("model.postprocess.object_threshold=1.5", "object_threshold is 1.5; it must be at least 0 and at most 1"),
    ("training.zero.reduce_bucket_size=0", "training.zero.reduce_bucket_size is 0; it must be at least 1"),
    ("cluster.num_workers=[0, 2]", "cluster.num_workers is [0, 2]; each must be at least 1"),
    ("cluster.resources_per_worker={trainer: -1}", "cluster.resources_per_worker is {'trainer': -1.0}; each must be"),
    ("evaluation.max_size=0", "evaluation.max_size is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("override", "message"), WRONG_NUMBERS)
def test_number_out_of_range_is_reported_with_its_range(override, message):
    assert message in problems_of(RECIPE, override)


def test_all_numbers_out_of_range_are_listed_at_once():
    problems = problems_of(RECIPE, *(override for override, _ in WRONG_NUMBERS))
    assert f"{len(WRONG_NUMBERS)} problems" in problems
    assert all(message in problems for _, message in WRONG_NUMBERS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment={kind: lsj, min_scale: 2, max_scale: 1}", "data.augment.min_scale is 2, above max_scale"),
        ("data.augment={kind: scale, max_size: 100}", "data.augment.max_size is 100, below the smallest"),
        ("data.augment={kind: scale, shortest_edges: []}", "data.augment.shortest_edges is empty"),
        (
            "training.schedule={kind: multi_step, milestones: [5, 3]}",
            "each must be at least 1 and larger than the previous one",
        ),
        ("evaluation.max_size=10", "evaluation.max_size is 10, below evaluation.shortest_edge"),
    ],
)
def test_contradicting_numbers_are_rejected(override, message):
    assert message in problems_of(RECIPE, override)


def test_a_wholly_frozen_model_may_be_evaluated_but_not_trained():
    config = parse_recipe(RECIPE, ["model.freeze=[transformer_decoder, pixel_decoder, backbone]"])
    with pytest.raises(ConfigError, match=r"model\.freeze is \[.*\], the whole model, so nothing is trained; remove a"):
        settled_run(config, AvailableDevices(), during_training=False)
    parse_recipe(RECIPE, ["model.freeze=[transformer_decoder, backbone]"]).model.require_trainable()


def test_model_freeze_with_bf16_precision_is_rejected():
    problem = problems_of(RECIPE, "model.freeze=[backbone]", "training.precision=bf16", "training.zero.stage=2")
    assert "set training.precision to bf16_autocast" in problem


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_default_evaluation_uses_the_validation_set_and_the_training_task(name):
    text = RECIPE.partition("evaluation:")[0].replace("val:", f"{name}:")
    config = parse_recipe(text, ["data.task=instance"])
    assert [s.dataset for s in config.evaluation.sets] == [name]
    assert config.evaluation.tasks == ("instance",)
    assert parse_recipe(dump_recipe(config)) == config


def test_explicit_evaluation_settings_are_kept():
    text = RECIPE.partition("evaluation:")[0]
    assert parse_recipe(text, ["evaluation.sets=[]"]).evaluation.sets == ()
    assert parse_recipe(text, ["evaluation.tasks=[semantic]"]).evaluation.tasks == ("semantic",)
    assert parse_recipe(text.replace("val:", "other:")).evaluation.sets == ()


def test_paths_are_normalised_unless_a_symlink_changes_the_result(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    monkeypatch.chdir(tmp_path / "here")
    shards = ["datasets.train.shards=../shards/./train", "datasets.val.shards=link/../val"]
    config = load_recipe("demo", ["output=../here/../runs", *shards])
    assert config.run_folder == str(tmp_path / "runs" / "demo")
    assert config.datasets["train"].shards == str(tmp_path / "shards" / "train")
    assert config.datasets["val"].shards == str(tmp_path / "here" / "link" / ".." / "val")
