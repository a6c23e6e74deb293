"""The identity that is stored with weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.label_space import LabelSpace
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import MaskedTransformerDecoderConfig, ModelConfig, TimmBackboneConfig
from m2f.model.errors import WeightsError
from m2f.model.weights.files import read_state
from m2f.trainer.checkpoint.folder import MANIFEST, WEIGHTS, CheckpointManifest, file_entry
from m2f.trainer.checkpoint.identity import (
    METADATA_KEY,
    InputRules,
    ModelIdentity,
    read_metadata,
    require_own_checkpoint,
)
from m2f.trainer.checkpoint.weights import check_start_weights, fetched_backbone, known_class_rows
from m2f.trainer.errors import CheckpointError

CLASSES = (Category(7, "car", True, (1, 2, 3)), Category(2, "sky", False, (4, 5, 6)))
RULES = InputRules(shortest_edge=64, max_size=96, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.5))
DEFAULT_RULES = replace(RULES, pixel_mean=ModelConfig.pixel_mean, pixel_std=ModelConfig.pixel_std)
IDENTITY = ModelIdentity(
    label_spaces=(LabelSpace("panoptic", CLASSES),), input=RULES, num_queries=12, recipe="name: x\n"
)


def test_identity_round_trips_through_text_and_metadata(tmp_path):
    assert ModelIdentity.from_json(IDENTITY.to_json(), "x") == IDENTITY
    assert IDENTITY.tasks == ("panoptic",)
    weights = {"a": torch.arange(3.0)}
    save_file(weights, tmp_path / "w.safetensors", metadata={"format": "pt", METADATA_KEY: IDENTITY.to_json()})
    assert read_metadata(tmp_path / "w.safetensors") == IDENTITY
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], weights["a"])
    torch.save({"model": weights, METADATA_KEY: IDENTITY.to_json()}, tmp_path / "w.pth")
    assert read_metadata(tmp_path / "w.pth") == IDENTITY


def test_weights_without_identity_return_none(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"format": "pt"})
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:20])
    (tmp_path / "text.pkl").write_bytes(b"nothing")
    for name in ("w.safetensors", "w.pth", "cut.safetensors", "text.pkl", "absent.pth"):
        assert read_metadata(tmp_path / name) is None


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 2}'])
def test_a_damaged_identity_is_named(text):
    with pytest.raises(CheckpointError, match=r"copy/identity\.json"):
        ModelIdentity.from_json(text, "copy/identity.json")


def test_the_identity_of_a_newer_version_asks_for_an_upgrade_and_not_for_a_repair():
    with pytest.raises(CheckpointError, match=r"^copy/identity\.json was written by a newer version .*; upgrade m2f$"):
        ModelIdentity.from_json('{"version": 2}', "copy/identity.json")


def test_ranks_refuse_a_checkpoint_of_other_classes_or_another_task(tmp_path):
    (tmp_path / "identity.json").write_text(IDENTITY.to_json())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/identity.json").write_text("{}")
    urls = [str(tmp_path / "absent"), str(tmp_path / "damaged"), str(tmp_path)]
    require_own_checkpoint(Storage(), urls, IDENTITY)
    require_own_checkpoint(Storage(), urls, None)
    reordered = replace(IDENTITY, label_spaces=(LabelSpace("panoptic", CLASSES[::-1]),))
    with pytest.raises(CheckpointError, match=r"checkpoint: id 7 'car' \(thing\); data: id 2 'sky' \(stuff\)"):
        require_own_checkpoint(Storage(), urls, reordered)
    with pytest.raises(CheckpointError, match=r"for the task panoptic, but data\.task is semantic"):
        require_own_checkpoint(Storage(), urls, replace(IDENTITY, label_spaces=(LabelSpace("semantic", CLASSES),)))


def stored_weights(folder, identity):
    path = folder / "stored.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt", METADATA_KEY: identity.to_json()})
    return str(path)


def test_start_weights_with_another_pixel_mean_or_number_of_heads_are_refused(tmp_path):
    rules = replace(RULES, pixel_mean=(127.0, 127.0, 127.0), pixel_std=(128.0, 128.0, 128.0))
    for recipe in ("", "name: x\n"):
        weights = stored_weights(tmp_path, replace(IDENTITY, input=rules, recipe=recipe))
        with pytest.raises(WeightsError, match=r"model\.pixel_mean: \[127\.0, 127\.0, 127\.0\] -> \[123\.675, "):
            check_start_weights(IDENTITY, ModelConfig(weights=weights), Storage())
        equal = ModelConfig(weights=weights, pixel_mean=rules.pixel_mean, pixel_std=rules.pixel_std)
        check_start_weights(IDENTITY, equal, Storage())
    recipe = "model: {pixel_mean: [127, 127, 127], transformer_decoder: {kind: masked, num_heads: 4, num_queries: 9}}\n"
    weights = stored_weights(tmp_path, replace(IDENTITY, input=rules, recipe=recipe))
    config = ModelConfig(weights=weights, pixel_mean=rules.pixel_mean, pixel_std=rules.pixel_std)
    with pytest.raises(WeightsError, match=r"\n  model\.transformer_decoder\.num_heads: 4 -> 8$"):
        check_start_weights(IDENTITY, config, Storage())
    decoder = MaskedTransformerDecoderConfig(num_heads=4)
    check_start_weights(IDENTITY, replace(config, transformer_decoder=decoder), Storage())


def test_start_weights_of_a_backbone_with_another_pixel_mean_are_refused(tmp_path):
    rules = replace(DEFAULT_RULES, pixel_std=(128.0, 128.0, 128.0))
    recipe = "model: {transformer_decoder: {kind: masked, num_heads: 4}}\n"  # the head may differ
    backbone = TimmBackboneConfig(weights=stored_weights(tmp_path, replace(IDENTITY, input=rules, recipe=recipe)))
    with pytest.raises(WeightsError, match=r"^model\.backbone\.weights is .*\n  model\.pixel_std: .*-> \[58\.395"):
        check_start_weights(IDENTITY, ModelConfig(backbone=backbone), Storage())
    check_start_weights(IDENTITY, ModelConfig(backbone=backbone, pixel_std=rules.pixel_std), Storage())


def test_backbone_weights_of_a_url_are_fetched_and_those_of_a_checkpoint_are_verified(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "a" / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    save_file({"backbone.a": torch.ones(2)}, file := folder / WEIGHTS)
    (folder / MANIFEST).write_bytes(CheckpointManifest(7, 1, 1, {WEIGHTS: file_entry(file)}).to_json())

    def backbone_of(weights):
        with fetched_backbone(ModelConfig(backbone=TimmBackboneConfig(weights=weights)), Storage()) as model:
            return model.backbone.weights, None if weights is None else list(read_state(str(model.backbone.weights)))

    assert backbone_of(None) == (None, None)
    assert backbone_of(str(folder)) == (str(file), ["backbone.a"])
    monkeypatch.setattr(Storage, "get_file", lambda self, url, path: path.write_bytes(file.read_bytes()))
    monkeypatch.setattr(Storage, "exists", lambda self, url: url == f"s3://box/step/{WEIGHTS}")
    path, names = backbone_of("s3://box/step")
    assert names == ["backbone.a"]
    assert "://" not in path
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"step_00000007 is damaged: the checksum of weights\.safetensors"):
        backbone_of(str(folder))


def test_missing_start_weights_are_refused_by_the_name_of_their_setting(tmp_path):
    (tmp_path / "folder").mkdir()
    for weights, problem in ((f"{tmp_path}/nope.pt", "no such file or folder"), (f"{tmp_path}/folder", "none of")):
        backbone = TimmBackboneConfig(weights=weights)
        with pytest.raises(WeightsError, match=rf"^model\.weights: weights {weights}: .*{problem}.*; set it to an ex"):
            check_start_weights(IDENTITY, ModelConfig(weights=weights), Storage())
        with pytest.raises(WeightsError, match=rf"^model\.backbone\.weights: weights {weights}: .*{problem}"):
            check_start_weights(IDENTITY, ModelConfig(backbone=backbone), Storage())
        model = ModelConfig(weights=stored_weights(tmp_path, replace(IDENTITY, input=DEFAULT_RULES)), backbone=backbone)
        check_start_weights(IDENTITY, model, Storage())  # a whole model does not need the backbone's weights


@pytest.mark.parametrize("tasks", [("panoptic", "semantic"), ("semantic", "panoptic")])
def test_a_semantic_model_shares_class_rows_of_things_and_stuff(tmp_path, tasks):
    old, new = (
        replace(IDENTITY, label_spaces=(LabelSpace(task, classes),))
        for task, classes in zip(tasks, (CLASSES, (Category(1, "car", False, (1, 2, 3)),)), strict=True)
    )
    assert known_class_rows(new, stored_weights(tmp_path, old), Storage()) == (0,)
    panoptic = replace(new, label_spaces=(LabelSpace("panoptic", new.label_spaces[0].classes),))
    both = stored_weights(tmp_path, replace(old, label_spaces=(LabelSpace("panoptic", CLASSES),)))
    with pytest.raises(DataError, match=r"'car' \(stuff\).*'car' \(thing\)"):
        known_class_rows(panoptic, both, Storage())
