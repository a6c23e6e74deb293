import json
import re

import pytest

from m2f.model.errors import ConfigError
from m2f.trainer.config import CosineSchedule, MultiStepSchedule, PolySchedule, StagedPolySchedule, TrainingConfig
from m2f.trainer.engine.schedule import lr_factor, schedule_warnings

COCO_50EP = MultiStepSchedule(milestones=(327_778, 355_092))
COCO_100EP = MultiStepSchedule(milestones=(655_556, 710_184))
OFFICIAL = {
    "coco_50ep": COCO_50EP,
    "coco_100ep": COCO_100EP,
    "ade20k_160k": PolySchedule(),
    "cityscapes_90k": PolySchedule(),
    "mapillary_300k": PolySchedule(),
}


def test_five_official_schedules_are_reproduced(goldens):
    golden = json.loads((goldens / "g_lr_schedule.json").read_text())
    assert set(golden) == set(OFFICIAL)
    for name, expected in golden.items():
        for step, lr in expected["lr_at_iter"]:
            ours = 1e-4 * lr_factor(OFFICIAL[name], step, expected["max_iter"])
            assert ours == pytest.approx(lr, rel=1e-12), f"{name} at {step}"


def test_warmup_is_linear_and_ends():
    schedule = PolySchedule(power=0.0, warmup_steps=3)
    assert [lr_factor(schedule, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_starts_after_the_warmup_and_falls_to_zero():
    schedule = CosineSchedule(warmup_steps=3)
    expected = [0.25, 0.5, 0.75, 1.0, 0.75, 0.25, 0.0, 0.0]
    assert [lr_factor(schedule, step, 9) for step in (0, 1, 2, 3, 5, 7, 9, 10)] == pytest.approx(expected, abs=1e-15)
    assert lr_factor(CosineSchedule(), 50, 100) == pytest.approx(0.5)


def test_learning_rate_is_multiplied_by_gamma_at_each_milestone():
    schedule = MultiStepSchedule(milestones=(2, 4), gamma=0.5)
    assert [lr_factor(schedule, step, 6) for step in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_milestones_must_increase():
    with pytest.raises(
        ConfigError, match=r"milestones is \[20, 10\]; each must be at least 1 and larger than the previous one"
    ):
        MultiStepSchedule(milestones=(20, 10))


@pytest.mark.parametrize(
    ("schedule", "warning"),
    [
        (PolySchedule(warmup_steps=99), None),
        (PolySchedule(warmup_steps=100), "warm-up takes 100 steps, but training.max_steps is 100"),
        (StagedPolySchedule(warmup_steps=50, backbone_warmup_steps=70), "warm-up takes 120 steps"),
        (MultiStepSchedule(milestones=(80, 99)), None),
        (MultiStepSchedule(milestones=(80, 100, 200)), r"does not drop at \[100, 200\] \(training.schedule.milestones"),
        (MultiStepSchedule(milestones=()), None),
    ],
)
def test_parts_of_the_schedule_after_the_last_step_cause_a_warning(schedule, warning):
    warnings = schedule_warnings(TrainingConfig(max_steps=100, schedule=schedule))
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert re.search(warning, warnings[0])


def test_poly_is_zero_after_the_end():
    assert lr_factor(PolySchedule(), 101, 100) == 0.0
