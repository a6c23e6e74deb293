"""Tests of checkpoints from a short local run.

A checkpoint works without its run folder, damage is detected, and a run continues only from a matching checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from m2f.cluster.cli import main
from m2f.cluster.predict.trained_model import open_trained
from m2f.cluster.recipe.load import dump_recipe, load_recipe
from m2f.cluster.recipe.pinned_weights import with_pinned_weights
from m2f.cluster.recipe.stored import STORED_RECIPE
from m2f.cluster.start.continuation import check_continuation
from m2f.cluster.train.compose import compose_job
from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.model.mask2former import build_model
from m2f.model.weights.load import load_weights
from m2f.trainer.checkpoint.folder import list_checkpoints, read_manifest
from m2f.trainer.checkpoint.identity import METADATA_KEY, read_metadata
from m2f.trainer.checkpoint.weights import known_class_rows
from m2f.trainer.config import CheckpointConfig
from m2f.trainer.errors import CheckpointError
from m2f.trainer.start_model import start_model
from tests.cluster.tiny_run import small_sets, tiny_config
from tests.data_pipeline.coco_set import CocoSet

pytestmark = pytest.mark.slow
PAST = Path(__file__).parents[2] / "past" / "451e9d8"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train for two steps, and return the configuration and the URL of the checkpoint."""
    folder = tmp_path_factory.mktemp("identity")
    config = tiny_config(folder, "tiny", small_sets(str(folder), Storage()))
    training = replace(config.training, max_steps=2, ema_decay=0.5, checkpoint=CheckpointConfig(every_steps=2))
    config = replace(config, training=training, evaluation=EvaluationConfig(shortest_edge=64, max_size=96))
    config = replace(config, cluster=replace(config.cluster, num_workers=1))
    assert train_locally(config).status == "finished"
    return config, list_checkpoints(Storage(), config.run_folder)[0].url


@pytest.fixture
def copied(run, tmp_path):
    """Copy the checkpoint folder, as to another machine without the recipe's shards and run folder."""
    _, url = run
    folder = tmp_path / "copied"
    shutil.copytree(url, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(Path(url).parents[3]), "/not/here"))
    return folder


@pytest.fixture
def image(tmp_path):
    pixels = torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "image.png").write_bytes(encode_png(pixels.numpy()))
    return tmp_path / "image.png"


def m2f(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def class_table(config):
    return Manifest.load(config.datasets["train"].shards, Storage()).categories.categories


def test_checkpoint_stores_identity_of_its_model(run):
    config, url = run
    assert "identity.json" in read_manifest(Storage(), url).files
    for name in ("weights.safetensors", "ema.safetensors"):
        identity = read_metadata(Path(url, name))
        assert identity is not None
        assert identity.label_spaces[0].classes == class_table(config)
        assert identity.tasks == ("panoptic",)
        assert (identity.input.shortest_edge, identity.input.max_size) == (64, 96)
        assert identity.num_queries == 8
        assert identity.recipe == Path(url, "recipe.yaml").read_text()
        dumped = dump_recipe(config).splitlines()
        resolved = {line.strip() for line in identity.recipe.splitlines()} - {line.strip() for line in dumped}
        auto = {"compile: false", "pretrained: false", "num_gpus_per_worker: 0.0", "num_gpus_per_actor: 0.0"}
        assert resolved == auto
        assert identity.recipe.count("precision: fp32") == 2  # for training and for evaluation
        assert len(identity.recipe.splitlines()) == len(dumped)
        assert ": auto\n" not in identity.recipe
        assert identity.to_json() == Path(url, "identity.json").read_text()
        with safe_open(Path(url, name), "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_copied_checkpoint_predicts_without_run_folder_and_shards(run, copied, image, tmp_path, capsys):
    config, _ = run
    status, text = m2f(capsys, "predict", copied, image, "--output", tmp_path / "seen", "--min-score", "0")
    assert status == 0, text
    names = [entry["name"] for entry in json.loads((tmp_path / "seen/categories.json").read_text())]
    assert names == [c.name for c in class_table(config)]
    assert open_trained(str(copied), (), None).classes == class_table(config)
    status, text = m2f(capsys, "eval", copied)
    assert (status, "give a folder for the results" in text) == (2, True), text


def test_exported_graphs_contain_identity(copied, tmp_path, capsys):
    trained = open_trained(str(copied), (), None)
    for export_format, name in (("torch_export", "m.pt2"), ("onnx", "m.onnx")):
        words = ("export", copied, "--format", export_format, "--output", tmp_path / name, "--size", "64", "64")
        status, text = m2f(capsys, *words)
        assert status == 0, text
    extra = {METADATA_KEY: ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert extra[METADATA_KEY] == trained.identity.to_json()
    onnx = pytest.importorskip("onnx")
    props = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert props[METADATA_KEY] == trained.identity.to_json()


@pytest.mark.parametrize("verb", ["predict", "export", "eval", "analyze"])
def test_flipped_bit_in_weights_is_detected_before_loading(run, copied, image, tmp_path, capsys, verb):
    config, _ = run
    path = copied / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    words = {
        "predict": ("predict", copied, image, "--output", tmp_path / "seen"),
        "export": ("export", copied, "--format", "torch_export", "--output", tmp_path / "m.pt2"),
        "analyze": ("analyze", "layers", recipe, "--checkpoint", copied, "--images", "1"),
        "eval": ("eval", recipe, "--checkpoint", copied, "evaluation.sets=[{dataset: val}]"),
    }
    status, text = m2f(capsys, *words[verb])
    assert status == 2, text
    assert f"checkpoint {copied} is damaged: the checksum of ema.safetensors differs" in text
    assert "Traceback" not in text


def test_changed_identity_file_is_detected(copied, capsys, image, tmp_path):
    path = copied / "identity.json"
    path.write_text(path.read_text().replace('"is_thing": true', '"is_thing": false', 1))
    status, text = m2f(capsys, "predict", copied, image, "--output", tmp_path / "seen")
    assert (status, "the checksum of identity.json differs" in text) == (2, True), text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.transformer_decoder.num_queries=20", "model.transformer_decoder.num_queries: 8 -> 20"),
        ("model.transformer_decoder.num_layers=3", "model.transformer_decoder.num_layers: 2 -> 3"),
        ("model.backbone.options.channels=[8,16,16,64]", "options.channels: [8, 16, 16, 32] -> [8, 16, 16, 64]"),
        ("training.precision=bf16_autocast", "training.precision: fp32 -> bf16_autocast"),
        ("training.optimizer.layer_decay=0.9", "training.optimizer.layer_decay: 1.0 -> 0.9"),
        ("training.optimizer.decay_everything=true", "training.optimizer.decay_everything: False -> True"),
        ("model.freeze=[backbone]", "model.freeze: [] -> ['backbone']"),
        ("data.task=semantic", "for the task panoptic, but data.task is semantic"),
    ],
)
def test_run_with_checkpoint_rejects_changed_model_or_optimizer_settings(run, tmp_path, capsys, override, named):
    config, _ = run
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    words = ("train", recipe, "--launcher", "local", "training.max_steps=9", "data.accept_changes=true", override)
    status, text = m2f(capsys, *words)
    assert status == 2, text
    assert named in text
    assert "Traceback" not in text


def test_run_continues_with_changed_losses_learning_rates_and_colours(run):
    config, _ = run
    training = replace(config.training, max_steps=9, optimizer=replace(config.training.optimizer, lr=1e-6))
    model = replace(config.model, loss=replace(config.model.loss, class_weight=4.0))
    job = compose_job(replace(config, training=training, model=model))
    assert job.identity is not None
    space = job.identity.label_spaces[0]
    recolored_classes = tuple(replace(c, color=(1, 2, 3)) for c in space.classes)
    identity = replace(job.identity, label_spaces=(replace(space, classes=recolored_classes),))
    check_continuation(replace(job, identity=identity), Storage())


def test_run_with_checkpoint_rejects_changed_classes(run):
    config, _ = run
    job = compose_job(config)
    assert job.identity is not None
    space = job.identity.label_spaces[0]
    first, second, *rest = space.classes
    for classes in ((second, first, *rest), space.classes[:-1], (replace(first, name="new"), second, *rest)):
        changed = replace(job.identity, label_spaces=(replace(space, classes=tuple(classes)),))
        with pytest.raises(CheckpointError, match=r"have different classes.*Differences by label"):
            check_continuation(replace(job, identity=changed), Storage())


def test_changes_of_task_and_model_are_refused_in_one_message(run):
    config, _ = run
    decoder = replace(config.model.transformer_decoder, num_queries=16)
    model = replace(config.model, transformer_decoder=decoder)
    job = compose_job(replace(config, model=model, data=replace(config.data, task="instance")))
    with pytest.raises(CheckpointError) as caught:
        check_continuation(job, Storage())
    assert "for the task panoptic, but data.task is instance" in str(caught.value)
    assert "num_queries: 8 -> 16" in str(caught.value)
    assert str(caught.value).count("revert the change") == 1


def test_changed_data_order_requires_accept_changes(run):
    config, _ = run
    for changed in (replace(config, seed=config.seed + 1), replace(config, data=replace(config.data, window=3))):
        with pytest.raises(CheckpointError, match=r"another data order.*data\.accept_changes=true"):
            check_continuation(compose_job(changed), Storage())
        accepting = replace(changed, data=replace(changed.data, accept_changes=True))
        check_continuation(compose_job(accepting), Storage())


def test_run_of_earlier_version_is_compared_by_its_recipe(tmp_path, monkeypatch):
    shutil.copytree(PAST, tmp_path / "past")
    monkeypatch.chdir(tmp_path / "past")
    check_continuation(compose_job(load_recipe("recipe.yaml", ["training.max_steps=5000"])), Storage())
    job = compose_job(load_recipe("recipe.yaml", ["model.transformer_decoder.num_queries=20"]))
    with pytest.raises(CheckpointError, match=r"num_queries: 8 -> 20"):
        check_continuation(job, Storage())


# Start from weights


def coco_shards(folder, categories):
    folder.mkdir()
    coco = CocoSet(folder)
    coco.categories = [{"id": i, "name": name} for i, name in categories]
    coco.write()
    dataset = DatasetConfig(shards=str(folder / "shards"), source=coco.instances_source)
    write_dataset(open_reader(dataset.source), dataset, Storage())
    return dataset


def test_class_head_keeps_rows_of_known_classes_when_classes_are_added(run, tmp_path):
    config, url = run
    old = class_table(config)
    dataset = coco_shards(tmp_path / "new", [(3, "submarine"), (1, old[4].name), (2, old[1].name)])
    assert [old[4].is_thing, old[1].is_thing] == [True, True]
    config = replace(config, name="finer", datasets={"train": dataset}, data=replace(config.data, task="instance"))
    job = compose_job(config)
    rows = known_class_rows(job.identity, f"{url}/weights.safetensors", Storage())
    assert rows == (None, 4, 1)
    torch.manual_seed(3)
    model = build_model(job.model, pretrained_backbone=False)
    fresh = model.transformer_decoder.class_embed.weight.detach().clone()
    report = load_weights(model, f"{url}/weights.safetensors", rows)
    assert report.complete, report
    assert "the rows of 2 known classes and of no object are kept, 1 initialised randomly" in str(report)
    with safe_open(Path(url, "weights.safetensors"), "pt") as file:
        stored = file.get_tensor("transformer_decoder.class_embed.weight")
    expected = torch.stack([fresh[0], stored[4], stored[1], stored[-1]])
    assert torch.equal(model.transformer_decoder.class_embed.weight, expected)


def test_weights_with_contradicting_classes_are_rejected(run, tmp_path):
    config, url = run
    stuff = next(c for c in class_table(config) if not c.is_thing)
    dataset = coco_shards(tmp_path / "new", [(3, stuff.name), (1, class_table(config)[-1].name)])
    model = replace(config.model, weights=url)
    config = replace(config, name="finer", model=model, datasets={"train": dataset})
    with pytest.raises(DataError, match=rf"'{stuff.name}' \(thing\).*'{stuff.name}' \(stuff\)"):
        check_continuation(compose_job(replace(config, data=replace(config.data, task="instance"))), Storage())


def test_the_backbone_of_a_run_starts_another_run_from_its_newest_checkpoint(run):
    config, url = run
    backbone = replace(config.model.backbone, weights=config.run_folder)
    other = replace(config, name="other", model=replace(config.model, backbone=backbone, freeze=("backbone",)))
    pinned = with_pinned_weights(other, Storage())
    assert pinned.model.backbone.weights == url
    assert with_pinned_weights(pinned, Storage()) == pinned
    notices = []
    job = compose_job(pinned)
    check_continuation(job, Storage())
    model, start = start_model(job, Storage(), SimpleNamespace(report=notices.append))
    state = load_file(f"{url}/weights.safetensors")
    assert all(torch.equal(t, state[f"backbone.{name}"]) for name, t in model.backbone.state_dict().items())
    assert [(weights.setting, weights.source) for weights in start] == [("model.backbone.weights", url)]
    assert start[0].sha256 in notices[0].message


def test_a_resumed_run_keeps_the_checkpoint_that_its_backbone_started_from(run, tmp_path):
    config, _ = run
    backbone = replace(config.model.backbone, weights=str(tmp_path / "source"))
    resumed = replace(config, output=str(tmp_path), name="resumed")
    resumed = replace(resumed, model=replace(resumed.model, backbone=backbone))
    shutil.copytree(config.run_folder, resumed.run_folder)
    first = f"{tmp_path}/source/checkpoints/step_00000001-1"
    stored = replace(resumed, model=replace(resumed.model, backbone=replace(backbone, weights=first)))
    Path(resumed.run_folder, STORED_RECIPE).write_text(dump_recipe(stored))
    assert with_pinned_weights(resumed, Storage()).model.backbone.weights == first
