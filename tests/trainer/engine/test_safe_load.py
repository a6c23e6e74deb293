"""Resuming executes no code from a run folder, and DeepSpeed's files are restored bit-identically."""

import pickle
from pathlib import Path

import pytest
import torch

from m2f.trainer.checkpoint.random_state import load_random_state, save_random_state
from m2f.trainer.engine.safe_load import safe_loads
from m2f.trainer.errors import CheckpointError
from tests.trainer.restore_ranks import Command

QUICK_CASES = (
    *(f"fp32:{stage}:device" for stage in (0, 1, 2, 3)),
    "bf16:1:device",
    "fp16:1:device",
    "fp16:3:device",
    "fp32:1:offload",
)
"""Precision, ZeRO stage and location of the optimizer state. The remaining combinations run as a soak test."""
CASES = tuple(
    f"{precision}:{stage}:{place}"
    for precision in ("fp32", "bf16_autocast", "fp16_autocast", "bf16", "fp16")
    for stage in (0, 1, 2, 3)
    for place in ("device", "offload")
    if stage or (place == "device" and precision not in ("bf16", "fp16"))
)
FILES = {
    "engine.mp_rank_00_model": "mp_rank_00_model_states.pt",
    "engine.zero_pp": "optim_states.pt",
    "rng.rank": "rank_0000",
}
CLASSES = {"DynamicLossScaler", "LossScaler", "ZeroStageEnum", "fragment_address"}


def check_restored(seen):
    assert seen["equal"]
    assert all(seen["equal"])
    assert set(seen["loads"]) == {"True"}  # values of `weights_only`
    assert {name.rpartition(".")[2] for name in seen["globals"]} <= CLASSES


@pytest.fixture(scope="module")
def restored(launcher):
    launcher.run_each([f"restored:{case}" for case in QUICK_CASES])
    return launcher


@pytest.fixture(scope="module")
def attacked(launcher, training_shards):
    launcher.run_each(["saved"])
    launcher.run_each([*(f"attacked:{file}:command" for file in FILES), "attacked:engine.mp_rank_00_model:none"])
    across = [f"attacked:{file}:command" for file in FILES if file != "rng.rank"]
    launcher.run_each([f"{name}:one" for name in [*across, "attacked:engine.zero_pp:name"]], ranks=1)
    return launcher


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK_CASES)
def test_deepspeed_files_load_exactly_without_running_code(restored, case):
    check_restored(restored.result(f"restored:{case}"))


@pytest.mark.soak
def test_every_stage_and_precision_loads_exactly_without_running_code(launcher):
    launcher.run_each([f"restored:{case}" for case in CASES if case not in QUICK_CASES])
    for case in CASES:
        if case not in QUICK_CASES:
            check_restored(launcher.result(f"restored:{case}"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_file_that_runs_a_command_is_refused_despite_a_valid_checksum(attacked, file):
    for rank in (0, 1):
        seen = attacked.result(f"attacked:{file}:command", rank)
        check_refused(attacked, seen, FILES[file], "posix.system")


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file != "rng.rank"])
def test_conversion_for_other_ranks_refuses_a_command(attacked, file):
    check_refused(attacked, attacked.result(f"attacked:{file}:command:one"), FILES[file], "posix.system")


@pytest.mark.slow
def test_conversion_creates_no_folder_outside_the_checkpoint(attacked):
    seen = attacked.result("attacked:engine.zero_pp:name:one")
    check_refused(attacked, seen, "optim_states.pt", "'../../../EXECUTED'")


def check_refused(launcher, seen, file, rejected_name):
    assert "CheckpointError: " in seen["error"]
    assert file in seen["error"]
    assert rejected_name in seen["error"]
    assert "/checkpoints/step_00000003" in seen["error"]
    assert "\n" not in seen["error"]
    assert set(seen["loads"]) <= {"True"}
    assert not list(launcher.folder.parent.rglob("EXECUTED"))


@pytest.mark.slow
def test_same_checkpoint_without_an_attack_resumes(attacked):
    seen = attacked.result("attacked:engine.mp_rank_00_model:none")
    assert list(seen["losses"]) == ["4"]
    assert seen["loads"]
    assert set(seen["loads"]) == {"True"}


def test_random_states_do_not_run_code(tmp_path):
    path = tmp_path / "rank_00000.pt"
    save_random_state(path)
    load_random_state(path)
    torch.save({"python": Command(f"touch {tmp_path}/EXECUTED")}, path)
    with pytest.raises(CheckpointError, match=r"^rank_00000.pt references posix.system"):
        load_random_state(path)
    assert [file.name for file in tmp_path.iterdir()] == ["rank_00000.pt"]


@pytest.mark.parametrize("attack", ["plain pickle", "file of old torch", "loop", "empty"])
def test_other_files_raise_checkpoint_error(tmp_path, attack):
    path = tmp_path / "states.pt"
    loop: list = []
    loop.append(loop)
    match attack:
        case "plain pickle":
            path.write_bytes(pickle.dumps(Command(f"touch {tmp_path}/EXECUTED"), protocol=2))
        case "file of old torch":
            torch.save(Command(f"touch {tmp_path}/EXECUTED"), path, _use_new_zipfile_serialization=False)
        case "loop":
            torch.save(loop, path)
        case "empty":
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"^states.pt "), safe_loads():
        torch.load(path, weights_only=False)
    assert not Path(tmp_path, "EXECUTED").exists()


def test_a_name_that_is_a_path_is_refused_by_this_reason_alone(tmp_path):
    path = tmp_path / "states.pt"
    torch.save({"../outside": 1}, path)
    with pytest.raises(CheckpointError, match=r"^states.pt contains the name '../outside'"), safe_loads():
        torch.load(path)


def test_loads_outside_the_context_are_unchanged():
    load = torch.load
    allowed = set(torch.serialization.get_safe_globals())
    with safe_loads():
        assert torch.load is not load
    assert torch.load is load
    assert set(torch.serialization.get_safe_globals()) == allowed
