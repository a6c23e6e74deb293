"""EoMT learning rates, per parameter and per step, against those of the authors' optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f.model.eomt.annealing import mask_probabilities
from m2f.model.eomt.config import EomtDecoderConfig
from m2f.model.mask2former import build_model
from m2f.model.weights.eomt import eomt_to_authors
from m2f.trainer.config import OptimizerConfig, StagedPolySchedule
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.engine.schedule import backbone_lr_factor, lr_factor
from tests.model.eomt.test_eomt_parity import config_of

CASES = {
    "dinov2_default": ("eomt_dinov2_patch14", {}),
    "dinov3_coco_style": ("eomt_dinov3_patch16", {"layer_decay_spared": 3}),
    "dinov3_ade20k_style_lr_mult": ("eomt_dinov3_patch16", {}),
}


@pytest.fixture(scope="module")
def schedules(authors_goldens: Path) -> dict:
    return json.loads((authors_goldens / "eomt" / "schedules.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_learning_rates_equal_those_of_the_authors(schedules, authors_goldens, name):
    expected, (case, options) = schedules[name], CASES[name]
    described = json.loads((authors_goldens / "eomt" / case / "case.json").read_text())
    model = build_model(config_of(described["config"]), pretrained_backbone=False)
    settings = expected["settings"]
    config = OptimizerConfig(
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        backbone_lr_multiplier=1.0,
        layer_decay=settings["llrd"],
        layer_decay_from="top",
        decay_everything=True,
        **(options if not settings["llrd_l2_enabled"] else {}),
    )
    groups = build_param_groups(model, config)
    assert {group["weight_decay"] for group in groups} == {0.05}
    rate = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    rates = {key: torch.full_like(p, rate[p], dtype=torch.float64) for key, p in model.named_parameters()}
    found = {key: sorted(set(tensor.flatten().tolist())) for key, tensor in eomt_to_authors(rates).items()}
    assert set(found) == set(expected["base_lr"])
    assert set(found) == {
        key for key in load_file(authors_goldens / "eomt" / case / "weights.safetensors") if key in found
    }
    for key, value in expected["base_lr"].items():
        assert found[key] == pytest.approx([value], rel=1e-12), key


@pytest.mark.parametrize("name", CASES)
def test_rate_factors_over_the_steps_equal_those_of_the_authors(schedules, name):
    expected = schedules[name]
    warmup, backbone_warmup = expected["settings"]["warmup_steps"]
    schedule = StagedPolySchedule(warmup_steps=warmup, backbone_warmup_steps=backbone_warmup)
    total = expected["total_steps"]
    for step, factors in expected["multiplier_at_step"].items():
        found = (backbone_lr_factor(schedule, int(step), total), lr_factor(schedule, int(step), total))
        assert found == pytest.approx((factors["backbone_multiplier"], factors["other_multiplier"]), rel=1e-12)


def test_a_stage_may_have_no_warmup():
    schedule = StagedPolySchedule(warmup_steps=3, backbone_warmup_steps=0)
    assert [backbone_lr_factor(schedule, step, 10) for step in range(4)] == [0, 0, 0, 1]
    assert lr_factor(StagedPolySchedule(warmup_steps=0), 0, 10) == 1


def test_mask_probabilities_over_the_steps_equal_those_of_the_authors(schedules):
    for name in ("block0_of_coco_large_640_dinov2", "block0_of_coco_large_640_dinov3"):
        expected = schedules["annealing"][name]
        config = EomtDecoderConfig(num_layers=1, annealing=((expected["start"], expected["end"]),))
        for step, probability in expected["values"].items():
            assert mask_probabilities(config, int(step), 88692)[0] == pytest.approx(probability, abs=1e-7)


@pytest.mark.parametrize(
    ("layers", "starts"),
    [(3, (14782, 36955, 59128)), (4, (14782, 29564, 44346, 59128)), (5, (14782, 25869, 36955, 48042, 59128))],
)
def test_masks_vanish_in_sixths_of_the_run_by_default(layers, starts):
    config = EomtDecoderConfig(num_layers=layers)
    for block, start in enumerate(starts):
        at = [mask_probabilities(config, step, 6 * 14782)[block] for step in (start - 1, start + 1, start + 14782)]
        assert at[0] == 1
        assert 0 < at[1] < 1
        assert at[2] == 0
