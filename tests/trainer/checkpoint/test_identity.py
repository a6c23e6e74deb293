"""The identity that is stored with weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.label_space import LabelSpace
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.identity import (
    METADATA_KEY,
    InputRules,
    ModelIdentity,
    read_metadata,
    require_own_checkpoint,
)
from m2f.trainer.errors import CheckpointError

CLASSES = (Category(7, "car", True, (1, 2, 3)), Category(2, "sky", False, (4, 5, 6)))
RULES = InputRules(shortest_edge=64, max_size=96, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.5))
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
