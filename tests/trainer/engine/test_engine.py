"""DeepSpeed in every stage against plain torch on the same four images, on two ranks."""

import pytest
import torch

from m2f.model.errors import ConfigError
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.engine.engine import check_device, check_world_size, deepspeed_config
from m2f.trainer.errors import TrainingError

FULL_PRECISION = [
    *(f"stage{stage}" for stage in range(4)),
    *(f"stage{stage}_accumulated" for stage in range(4)),
    *(f"stage{stage}_small_buckets" for stage in range(1, 4)),
    *(f"stage{stage}_offload" for stage in range(1, 4)),
]


@pytest.fixture(scope="module")
def steps(launcher):
    launcher.run_well("engine_agreement")
    return launcher.seen("engine_agreement")


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_PRECISION)
def test_every_stage_and_grouping_equals_plain_torch(steps, case):
    assert steps[case]["applied"] == [True] * 3
    assert steps[case]["losses"] == pytest.approx(steps["plain"]["losses"], rel=1e-5)
    assert steps[case]["losses"][0] == pytest.approx(steps["plain"]["losses"][0], rel=1e-6)
    assert steps[case]["norms"] == pytest.approx(steps["plain"]["norms"], rel=1e-4)
    assert steps[case]["weight_error"] < 0.02  # as a share of what training changed
    assert steps[case]["average_error"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage0", "stage0_accumulated"])
def test_gradients_equal_those_of_the_whole_batch(steps, case):
    assert steps[case]["gradient_error"] < 1e-5  # of the norm: rounding


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bucket_size_and_overlap_do_not_change_a_bit(steps, stage):
    assert steps[f"stage{stage}_small_buckets"]["losses"] == steps[f"stage{stage}"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage1_bf16", "stage3_bf16"])
def test_bf16_autocast_is_close(steps, case):
    assert steps[case]["losses"] == pytest.approx(steps["plain"]["losses"], rel=0.02)
    assert steps[case]["losses"] != steps["stage1"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pure_bf16_trains_with_coordinates_in_fp32(steps, stage):
    seen = steps[f"stage{stage}_pure_bf16"]
    assert seen["losses"] == pytest.approx(steps["plain"]["losses"], rel=0.02)
    assert seen["applied"] == [True] * 3
    assert seen["dtypes"]["weights"] == ["torch.bfloat16"]
    assert set(seen["dtypes"]["coordinates"]) == {"torch.float32"}
    assert "torch.bfloat16" not in seen["dtypes"]["buffers"]


@pytest.mark.slow
def test_ranks_agree(launcher, steps):
    other = launcher.seen("engine_agreement", rank=1)
    assert all(other[case]["losses"] == steps[case]["losses"] for case in FULL_PRECISION)
    assert all(other[case]["norms"] == steps[case]["norms"] for case in FULL_PRECISION)


@pytest.mark.slow
def test_one_rank_needs_no_buckets_and_loses_no_bit(launcher):
    launcher.run_well("engine_alone", ranks=1)
    seen = launcher.seen("engine_alone")
    for case, alone in seen["alone"].items():
        assert alone == seen["among"][case], case
        tolerance = 0.02 if "bf16" in case else 1e-5
        assert alone["losses"] == pytest.approx(seen["plain"]["losses"], rel=tolerance)
    (first, moved), (second, stayed), (third, on) = seen["poisoned"]
    assert (first, second, third) == (True, False, True)
    assert stayed == 0 < min(moved, on)
    zero = deepspeed_config(TrainingConfig(max_steps=1), 1)["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (1, False, False)


def test_accumulation_follows_from_batch_and_ranks():
    training = TrainingConfig(max_steps=1, global_batch=16, micro_batch=2)
    settings = [deepspeed_config(training, world_size) for world_size in (1, 3, 8)]
    assert [s["gradient_accumulation_steps"] for s in settings] == [8, 3, 1]
    assert [s["train_micro_batch_size_per_gpu"] for s in settings] == [2, 2, 2]


def test_stage_0_is_clipped_by_us_and_others_by_deepspeed():
    plain, sharded = (
        deepspeed_config(TrainingConfig(max_steps=1, zero=ZeroConfig(stage=stage)), 1) for stage in (0, 3)
    )
    assert plain["gradient_clipping"] == 0.0
    assert sharded["gradient_clipping"] == 0.01
    assert sharded["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000


def test_16_bits_and_offload_in_deepspeeds_words():
    training = TrainingConfig(max_steps=1, precision="fp16", zero=ZeroConfig(stage=2, offload_optimizer=True))
    settings = deepspeed_config(training, 1)
    assert settings["fp16"] == {"enabled": True}  # the scale of the loss adapts itself
    assert settings["gradient_clipping"] == 0.01
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_need_fp32_copies(precision):
    with pytest.raises(ConfigError, match=rf"precision {precision} needs training\.zero\.stage 1, 2 or 3"):
        TrainingConfig(max_steps=1, precision=precision, zero=ZeroConfig(stage=0))


def test_what_cannot_work_names_the_setting():
    with pytest.raises(ConfigError, match=r"offload_optimizer needs training\.zero\.stage 1, 2 or 3"):
        ZeroConfig(stage=0, offload_optimizer=True)
    with pytest.raises(TrainingError, match="fp16, which needs a GPU; set it to bf16_autocast"):
        check_device(TrainingConfig(max_steps=1, precision="fp16"), torch.device("cpu"))


def test_more_ranks_than_images_are_refused():
    with pytest.raises(TrainingError, match="global_batch is 2, but there are 4 ranks"):
        check_world_size(TrainingConfig(max_steps=1, global_batch=2), 4)
