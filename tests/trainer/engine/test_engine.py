"""DeepSpeed in every ZeRO stage on two ranks against plain torch on the same images, four per step."""

from dataclasses import dataclass

import pytest
import torch

from m2f.model.errors import ConfigError
from m2f.trainer.config import TrainingConfig, ZeroConfig
from m2f.trainer.engine.engine import _master_weights, check_device, check_world_size, deepspeed_config
from m2f.trainer.errors import TrainingError
from tests.trainer.conftest import Launcher
from tests.trainer.engine_ranks import CASES, HOST_SYNC_CASES, SINGLE_RANK_CASES

FULL_PRECISION = [case for case in CASES if "16" not in case]


@dataclass(frozen=True)
class Steps:
    """Results of three steps by case. Reading a case that failed raises AssertionError, so only its tests fail."""

    launcher: Launcher
    scenario: str

    def __getitem__(self, case):
        return self.launcher.result(f"{self.scenario}:{case}")

    def of_rank(self, case, rank):
        return self.launcher.result(f"{self.scenario}:{case}", rank)


@pytest.fixture(scope="module")
def steps(launcher):
    launcher.run_each(["engine_plain", *(f"engine_agreement:{case}" for case in CASES)])
    return Steps(launcher, "engine_agreement")


@pytest.fixture(scope="module")
def plain(launcher, steps):
    return launcher.result("engine_plain")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("one_rank"))
    sync_scenarios = (f"engine_waits:{case}" for case in HOST_SYNC_CASES)
    cases = (f"engine_alone:{case}" for case in SINGLE_RANK_CASES)
    launcher.run_each(["engine_plain", "engine_poisoned", *sync_scenarios, *cases], ranks=1)
    return Steps(launcher, "engine_alone")


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_PRECISION)
def test_every_stage_and_grouping_equals_plain_torch(steps, plain, case):
    assert steps[case]["applied"] == [True] * 3
    assert steps[case]["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert steps[case]["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    assert steps[case]["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    assert steps[case]["weight_error"] < 0.02  # relative to the total change by training
    assert steps[case]["average_error"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage0", "stage0_accumulated"])
def test_gradients_equal_those_of_the_whole_batch(steps, case):
    assert steps[case]["gradient_error"] < 1e-5  # relative to the gradient norm; only rounding remains


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bucket_size_and_overlap_do_not_change_results(steps, stage):
    assert steps[f"stage{stage}_small_buckets"]["losses"] == steps[f"stage{stage}"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage1_bf16", "stage3_bf16", "stage1_bf16_fp32_pixels"])
def test_bf16_autocast_is_close(steps, plain, case):
    assert steps[case]["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert steps[case]["losses"] != steps["stage1"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "fp16" in case])
def test_fp16_autocast_gradients_are_close_to_fp32(steps, plain, case):
    """The engine sees unscaled gradients: their norm is that of fp32 although the loss is scaled."""
    seen = steps[case]
    assert seen["applied"] == [True] * 3
    assert seen["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-3)
    assert seen["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert seen["norms"][0] == pytest.approx(plain["norms"][0], rel=0.01)
    assert seen["dtypes"]["weights"] == ["torch.float32"]
    assert seen["losses"] != steps["stage1"]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pure_bf16_trains_with_coordinates_in_fp32(steps, plain, stage):
    seen = steps[f"stage{stage}_pure_bf16"]
    assert seen["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert seen["applied"] == [True] * 3
    assert seen["dtypes"]["weights"] == ["torch.bfloat16"]
    assert set(seen["dtypes"]["coordinates"]) == {"torch.float32"}
    assert "torch.bfloat16" not in seen["dtypes"]["buffers"]


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_PRECISION)
def test_all_ranks_report_equal_losses_and_norms(steps, case):
    first, second = (steps.of_rank(case, rank) for rank in (0, 1))
    assert second["losses"] == first["losses"]
    assert second["norms"] == first["norms"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SINGLE_RANK_CASES)
def test_one_rank_without_buckets_gives_bit_identical_results(one_rank, case):
    seen = one_rank[case]
    assert seen["alone"] == seen["among"]
    tolerance = 0.02 if "bf16" in case else 1e-5
    assert seen["alone"]["losses"] == pytest.approx(one_rank.launcher.result("engine_plain")["losses"], rel=tolerance)


@pytest.mark.slow
def test_a_step_with_a_bad_gradient_is_not_applied(one_rank):
    (first, first_change), (second, second_change), (third, third_change) = one_rank.launcher.result("engine_poisoned")
    assert (first, second, third) == (True, False, True)
    assert second_change == 0 < min(first_change, third_change)


@pytest.mark.slow
@pytest.mark.parametrize("case", HOST_SYNC_CASES)
def test_update_does_not_wait_for_the_device(one_rank, case):
    """Count synchronisations on a CPU. With offload, the norms are already on the host, so reading them is free."""
    seen = one_rank.launcher.result(f"engine_waits:{case}")
    assert seen["synchronized"] == 0
    assert max(seen["backward"]) <= 3  # caused by the CPU form of deformable attention
    assert max(seen["update"]) == 0 or case == "offload"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage1", "stage2", "bf16"])
def test_update_makes_few_calls_from_the_host(one_rank, case):
    """Expected: two calls per parameter, to copy its gradient, and a few per group. An earlier version made ten."""
    seen = one_rank.launcher.result(f"engine_waits:{case}")
    assert max(seen["calls"]) < 2.5 * seen["parameters"]


def test_one_rank_has_no_buckets():
    zero = deepspeed_config(TrainingConfig(max_steps=1, precision="fp32"), 1)["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (1, False, False)


def test_accumulation_follows_from_batch_and_ranks():
    training = TrainingConfig(max_steps=1, global_batch=16, micro_batch=2, precision="fp32")
    settings = [deepspeed_config(training, world_size) for world_size in (1, 3, 8)]
    assert [s["gradient_accumulation_steps"] for s in settings] == [8, 3, 1]
    assert [s["train_micro_batch_size_per_gpu"] for s in settings] == [2, 2, 2]


def test_deepspeed_clips_gradients_except_in_stage_0():
    plain, sharded = (
        deepspeed_config(TrainingConfig(max_steps=1, precision="fp32", zero=ZeroConfig(stage=stage)), 1)
        for stage in (0, 3)
    )
    assert plain["gradient_clipping"] == 0.0
    assert sharded["gradient_clipping"] == 0.01
    assert sharded["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000


def test_deepspeed_config_states_16_bits_and_offload():
    training = TrainingConfig(max_steps=1, precision="fp16", zero=ZeroConfig(stage=2, offload_optimizer=True))
    settings = deepspeed_config(training, 1)
    assert settings["fp16"] == {"enabled": True}  # dynamic loss scaling
    assert settings["gradient_clipping"] == 0.01
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_stored_copies_of_16_bit_weights_include_buffers(monkeypatch):
    model = torch.nn.Linear(2, 2).bfloat16()
    model.register_buffer("mean", torch.ones(2))
    model.register_buffer("index", torch.ones(2), persistent=False)
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", lambda parameter: parameter.detach().float())
    monkeypatch.setattr("m2f.trainer.engine.engine.dist.get_rank", lambda: 0)
    assert _master_weights(model, list(model.state_dict())).keys() == {"weight", "bias", "mean"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_pixel_decoder_in_fp32_needs_weights_in_fp32(precision):
    with pytest.raises(ConfigError, match=rf"pixel_decoder_fp32 .* set the precision to {precision}_autocast"):
        TrainingConfig(max_steps=1, precision=precision, pixel_decoder_fp32=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_need_fp32_copies(precision):
    with pytest.raises(ConfigError, match=rf"precision {precision} needs training\.zero\.stage 1, 2 or 3"):
        TrainingConfig(max_steps=1, precision=precision, zero=ZeroConfig(stage=0))


def test_error_for_impossible_settings_names_the_setting():
    with pytest.raises(ConfigError, match=r"offload_optimizer needs training\.zero\.stage 1, 2 or 3"):
        ZeroConfig(stage=0, offload_optimizer=True)
    with pytest.raises(TrainingError, match="fp16, which needs a GPU; set it to bf16_autocast, fp16_autocast"):
        check_device(TrainingConfig(max_steps=1, precision="fp16"), torch.device("cpu"))


def test_more_ranks_than_images_are_refused():
    with pytest.raises(TrainingError, match="global_batch is 2, but there are 4 ranks"):
        check_world_size(TrainingConfig(max_steps=1, global_batch=2), 4)
