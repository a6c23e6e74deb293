"""With equal weights, points and normalisers, Mask2Former of `transformers` and ours train with the same losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.quality.agreement import StepLosses, agree, losses_of_recipe, move_offsets, table
from benchmarks.quality.arms import ARMS, IMAGE_SETS, Run
from benchmarks.quality.transformers_model import to_our_names, transformers_twin
from benchmarks.synthetic_batches import dense_masks
from m2f.model.mask2former import build_model
from m2f.trainer.engine.param_groups import build_param_groups
from tests.model.loss_oracle import make_targets, one_hot

STEPS = 3
SMALL = (
    "datasets.train.source.num_images=12",
    "datasets.val.source.num_images=4",
    "data.augment.size=64",
    "model.loss.num_points=128",
    "training.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Run(IMAGE_SETS[0], ARMS[0], 0).config(tmp_path_factory.mktemp("shapes"), SMALL)


@pytest.fixture(scope="module")
def twins(config):
    model = dataclasses.replace(config.model, num_classes=7)
    ours = build_model(model)
    return ours, transformers_twin(ours, model)


def test_both_trainings_have_the_same_losses(config):
    losses = losses_of_recipe(config, STEPS, torch.float64)
    assert len({step.ours for step in losses}) == STEPS
    assert max(step.error for step in losses) < 1e-5
    assert torch.get_default_dtype() == torch.float32


def test_weights_convert_back_to_our_names(twins):
    ours, theirs = twins
    expected, found = ours.state_dict(), to_our_names(theirs.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_models_have_the_same_parameter_groups(twins, config):
    groups = [build_param_groups(model, config.training.optimizer) for model in twins]
    ours, theirs = (
        [(g["name"], sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in one] for one in groups
    )
    assert ours == theirs


def test_move_offsets_moves_points_off_pixel_centres(twins):
    model, _ = twins
    offsets = [p for name, p in model.named_parameters() if name.endswith("sampling_offsets.bias")]
    assert all((p - p.round()).abs().max() < 1e-6 for p in offsets)
    move_offsets(model)
    assert all((p - p.round()).abs().median() > 0.01 for p in offsets)


def test_table_states_whether_losses_agree():
    near, far = StepLosses(50.0, 50.01), StepLosses(50.0, 50.1)
    assert agree([near])
    assert not agree([near, far])
    lines = table("shapes, seed 0", [near, far], [far, far]).splitlines()
    assert lines[0].startswith(
        "shapes, seed 0: the losses of 2 steps differ (FAILS). The largest relative difference is 2"
    )
    assert lines[-1] == "| 2 | 50.00000 | 50.10000 | 2.0e-03 | 2.0e-03 |"
    assert table("shapes, seed 0", [near], [far]).startswith("shapes, seed 0: the losses of 1 steps agree.")


def test_dense_masks_contain_the_valid_targets_of_every_image():
    targets = make_targets([3, 0], layers=2)
    masks = dense_masks(targets)
    assert [len(image_masks) for image_masks in masks] == [3, 0]
    assert all(torch.equal(image_masks, one_hot(targets, image)) for image, image_masks in enumerate(masks))
