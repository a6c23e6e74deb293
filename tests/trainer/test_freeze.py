"""Frozen parts of the model never change: in every ZeRO stage, after restarts, and with another number of ranks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.mask2former import build_model
from m2f.model.weights.files import read_state
from m2f.trainer.checkpoint.folder import list_checkpoints
from m2f.trainer.config import OptimizerConfig, TrainingConfig
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.memory.plan import plan_memory
from m2f.trainer.telemetry.mfu import training_multiply_adds
from tests.trainer.tiny_job import MODEL, make_job

STAGES = ("0", "1", "2", "3")
HEADS = ("pmt", "vit_adapter")
FROZEN = replace(MODEL, backbone=replace(MODEL.backbone, norm="native"), freeze=("backbone",))


@pytest.mark.parametrize("parts", [("backbone",), ("pixel_decoder",), ("backbone", "pixel_decoder")])
def test_frozen_parts_get_no_gradients_and_no_new_statistics(parts):
    torch.manual_seed(0)
    model = build_model(replace(FROZEN, freeze=parts), pretrained_backbone=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictions = model(torch.randn(2, 3, 64, 64))
    (predictions.class_logits.sum() + predictions.mask_logits().sum()).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(parts)
        assert (parameter.grad is None, parameter.requires_grad) == (is_frozen, not is_frozen), name
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in changed if name.startswith(parts)}
    assert bool(changed) == ("backbone" not in parts)  # BatchNorm statistics


def test_frozen_backbone_keeps_no_activations_for_the_backward_pass():
    kept = []
    model = build_model(FROZEN, pretrained_backbone=False).train()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        maps = model.backbone(torch.randn(1, 3, 64, 64))
    assert kept == []
    assert not any(level.requires_grad for level in maps)


def test_optimizer_groups_exclude_frozen_weights():
    model = build_model(FROZEN, pretrained_backbone=False)
    groups = build_param_groups(model, OptimizerConfig(layer_decay=0.9))
    assert {group["name"] for group in groups} == {"head", "head_no_decay"}


def test_memory_plan_and_utilization_account_for_frozen_parts(tmp_path):
    job = make_job(tmp_path, "none")
    training = TrainingConfig(max_steps=1, precision="fp32")
    free, frozen = (plan_memory(model, job.data, training, 1, 5) for model in (replace(FROZEN, freeze=()), FROZEN))
    assert frozen.states < free.states
    assert frozen.per_image < free.per_image
    size = (64, 64)
    whole, less, least = (
        training_multiply_adds(replace(FROZEN, freeze=parts), size)
        for parts in ((), ("pixel_decoder",), ("backbone", "pixel_decoder"))
    )
    assert least < less < whole


@pytest.fixture(scope="module")
def runs(launcher):
    source = SyntheticSource(num_images=12, seed=1)
    shards = str(launcher.folder / "shards")
    write_dataset(open_reader(source), DatasetConfig(shards=shards, source=source), Storage())
    launcher.run_each([*(f"frozen:{stage}" for stage in STAGES), *(f"frozen_vit:{head}" for head in HEADS)])
    launcher.run_each(["frozen_old:1", "frozen_old:3", "frozen_damaged:1"])
    launcher.run_each([f"frozen_alone:{stage}" for stage in STAGES], ranks=1)
    return launcher


def checkpoint_of(runs, name, stage, step):
    checkpoints = list_checkpoints(Storage(), str(runs.folder / f"{name}_{stage}"))
    return Path(next(c.url for c in checkpoints if c.step == step))


def weights_of(runs, name, stage, step, file="weights.safetensors"):
    return read_state(checkpoint_of(runs, name, stage, step) / file)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test's fixture runs all scenarios
@pytest.mark.parametrize("stage", STAGES)
def test_run_with_frozen_parts_trains_the_rest_and_resumes_exactly(runs, stage):
    seen = runs.result(f"frozen:{stage}")
    assert all(seen[name].get("error") is None for name in seen)
    torch.manual_seed(3)  # same seed as the job
    start = build_model(FROZEN, pretrained_backbone=False).state_dict()
    whole = weights_of(runs, "whole", stage, 4)
    for name, value in whole.items():
        is_frozen = name.startswith("backbone.")
        assert torch.equal(value, start[name]) == is_frozen, name
    stopped = weights_of(runs, "stopped", stage, 4)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    average, stored = (weights_of(runs, name, stage, 4, "ema.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(average[name], stored[name]) for name in whole)
    assert all(torch.equal(average[name], start[name]) for name in whole if name.startswith("backbone."))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_survive_another_number_of_ranks(runs, stage):
    seen = runs.result(f"frozen_alone:{stage}")
    assert seen.get("error") is None
    before, after = (weights_of(runs, "stopped", stage, step) for step in (4, 6))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} <= same
    assert "transformer_decoder.class_embed.weight" not in same


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_are_stored_once_per_run(runs, stage):
    assert runs.result(f"frozen:{stage}")["resumed"].get("error") is None
    folders = [checkpoint_of(runs, "stopped", stage, step) for step in (2, 4)]  # the second one after a restart
    (first, second) = ([path.stat() for path in folder.glob("frozen-*")] for folder in folders)
    assert [file.st_ino for file in first] == [file.st_ino for file in second] != []
    frozen = {name for name in weights_of(runs, "stopped", stage, 4) if name.startswith("backbone.")}
    assert any("running_mean" in name for name in frozen)
    for name in ("weights.safetensors", "ema.safetensors"):
        assert not frozen & load_file(folders[1] / name).keys()
    for path in (folders[1] / "engine").glob("*model_states.pt"):
        state = torch.load(path, weights_only=False)
        assert state["module"]
        assert not [name for name in state["module"] if name.startswith("model.backbone.")]
        assert not state.get("frozen_param_fragments")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_checkpoints_of_earlier_versions_with_frozen_parts_are_resumed(runs, stage):
    assert all(seen.get("error") is None for seen in runs.result(f"frozen_old:{stage}").values())
    assert not list(checkpoint_of(runs, "old", stage, 2).glob("frozen-*"))
    assert len(list(checkpoint_of(runs, "old", stage, 4).glob("frozen-*"))) == 1
    for file in ("weights.safetensors", "ema.safetensors"):
        old, whole = (weights_of(runs, name, stage, 4, file) for name in ("old", "whole"))
        assert old.keys() == whole.keys()
        assert all(torch.equal(old[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_damaged_frozen_weights_make_a_run_resume_from_the_checkpoint_before(runs):
    seen = runs.result("frozen_damaged:1")
    assert seen.get("error") is None
    messages = [message for kind, step, message in seen["events"] if (kind, step) == ("damaged", 4)]
    assert len(messages) == 1
    assert "the checksum of frozen-" in messages[0]
    again, whole = (weights_of(runs, name, "1", 4) for name in ("damaged", "whole"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("head", HEADS)
def test_every_stage_trains_a_head_and_keeps_its_frozen_vision_transformer(runs, head):
    seen = runs.result(f"frozen_vit:{head}")
    for stage, steps in seen.items():
        assert steps["losses"] == pytest.approx(seen["0"]["losses"], rel=1e-4), stage
        assert not steps["changed"], stage
        assert all(name.endswith("attn_mask_probs") for name in steps["kept"]), (stage, steps["kept"])
        # Without ZeRO, both ranks hold the whole state. The stages pad their partitions.
        trained = steps["trained_elements"] * (2 if stage == "0" else 1)
        assert trained <= steps["optimizer_elements"] < trained + min(1000, steps["frozen_elements"]), stage
