"""Complete runs on two ranks (gloo, no Ray): recovery from failures, and the messages about them."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test's fixture runs all scenarios

STAGES = ("0", "1", "2", "3")
PRECISIONS = ("bf16", "fp16_autocast")


@pytest.fixture(scope="module")
def with_data(launcher):
    root = launcher.folder
    source = SyntheticSource(num_images=12, seed=1)
    write_dataset(open_reader(source), DatasetConfig(shards=str(root / "shards"), source=source), Storage())
    shutil.copytree(root / "shards", root / "damaged_shards")
    tar = next((root / "damaged_shards").rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tar.write_bytes(content)
    return launcher


@pytest.fixture(scope="module")
def whole_runs(with_data):
    """Runs that do not depend on each other."""
    with_data.run_each(
        (
            "uninterrupted",
            "drained_then_damaged",
            *(f"poisoned:{stage}" for stage in ("0", "1", "3")),
            "given_up",
            *(f"resumed_in_stage:{stage}" for stage in STAGES),
            *("unreadable", "misfits", "bad_samples", "changed_data", "other_stages"),
            *(f"resumed_in_precision:{precision}" for precision in PRECISIONS),
        )
    )
    return with_data


@pytest.fixture(scope="module")
def other_ranks(whole_runs):
    """Continue some of these runs on one rank, and some of those on two ranks again."""
    again = [f"in_precision_again:{precision}" for precision in PRECISIONS]
    whole_runs.run_each((*again, *(f"in_stage_again:{stage}:5" for stage in STAGES)), ranks=1)
    whole_runs.run_each([f"in_stage_again:{stage}:6" for stage in STAGES])
    return whole_runs


@pytest.fixture(scope="module")
def after_kill(with_data):
    codes, outputs = with_data.run("killed")
    assert codes[1] == -9, outputs[1]
    assert codes[0] not in (0, -9), outputs[0]
    with_data.run_successfully("resumed")
    return with_data


def test_a_run_reports_every_step_and_commits_its_checkpoints(whole_runs):
    run = whole_runs.result("uninterrupted")
    assert list(run["losses"]) == [str(step) for step in range(1, 9)]
    assert run["state"]["step"] == 8
    assert run["state"]["position"] == 32
    assert run["checkpoints"] == whole_runs.result("uninterrupted", rank=1)["checkpoints"] == [3, 6, 8]
    kept = sorted(
        path.parent.name for path in (whole_runs.folder / "uninterrupted/checkpoints").glob("*/manifest.json")
    )
    assert kept == ["step_00000006", "step_00000008"]


def test_killed_rank_does_not_change_the_losses(whole_runs, after_kill):
    resumed = after_kill.result("resumed")
    assert resumed["events"][0][:2] == ["resumed", 3]
    expected = whole_runs.result("uninterrupted")["losses"]
    assert resumed["losses"] == {step: loss for step, loss in expected.items() if int(step) > 3}


def test_drain_saves_a_checkpoint_and_a_damaged_checkpoint_is_skipped(whole_runs):
    both = whole_runs.result("drained_then_damaged")
    assert both["drained"]["state"]["step"] == 4
    assert both["drained"]["checkpoints"] == [3, 4]
    assert both["drained"]["events"][-1][0] == "drained"
    resumed = both["resumed"]
    assert [event[:2] for event in resumed["events"]] == [["damaged", 4], ["resumed", 3], ["finished", 8]]
    assert "optim_states.pt" in resumed["events"][0][2]
    expected = whole_runs.result("uninterrupted")["losses"]
    assert resumed["losses"] == {step: loss for step, loss in expected.items() if int(step) > 3}


def test_run_folder_records_commits_metrics_and_the_drain(whole_runs):
    both = whole_runs.result("drained_then_damaged")
    for points, steps in zip(both["kept"], ("123", "4"), strict=True):
        kept = {step: values["loss/total"] for step, values in points.items()}
        assert kept == {step: both["drained"]["losses"][step] for step in steps}
    assert both["ending"] == "drained"
    assert both["commits"] == [[3, 4], [3, 6, 8]]  # the commit of the damaged checkpoint is withdrawn


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_with_a_poisoned_image_is_skipped_and_the_image_named(whole_runs, stage):
    poisoned = whole_runs.result(f"poisoned:{stage}")
    kind, step, message = poisoned["events"][0]
    assert (kind, step) == ("skipped", 2)
    assert "positions 8 to 11" in message
    assert message.count("is not finite") == 1
    assert "," not in skipped_keys(message)
    assert poisoned["state"]["step"] == 3
    assert poisoned["state"]["position"] == 16
    assert poisoned["state"]["skipped_total"] == 1
    assert all(math.isfinite(loss) for loss in poisoned["losses"].values())
    assert poisoned["losses"]["3"] == pytest.approx(whole_runs.result("poisoned:1")["losses"]["3"], rel=1e-4)


def test_too_many_skipped_steps_stop_all_ranks(whole_runs):
    for rank in (0, 1):
        error = whole_runs.result("given_up", rank)["error"]
        assert "max_skipped_steps" in error
        assert skipped_keys(whole_runs.result("poisoned:1")["events"][0][2]) in error


def skipped_keys(message):
    return message.split("the loss of ")[1].split(" is not finite")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_bit_identical(whole_runs, stage):
    runs = whole_runs.result(f"resumed_in_stage:{stage}")
    assert runs["stopped"]["state"]["step"] == 1
    assert runs["stopped"]["events"][-1][0] == "stopped"
    assert runs["resumed"]["checkpoints"] == [1, 3]
    losses = runs["stopped"]["losses"] | runs["resumed"]["losses"]
    assert losses == {step: runs["whole"]["losses"][step] for step in "123"}
    assert runs["same_average"]


def test_every_rank_draws_other_numbers_also_after_resuming_with_another_number_of_ranks(with_data):
    with_data.run_each(["seeded:1", "seeded:2"])
    with_data.run_each(["seeded:3"], ranks=1)
    first, second = (with_data.result("seeded:1", rank) for rank in (0, 1))
    assert [with_data.result("seeded:2", rank) for rank in (0, 1)] == [first, second]  # restored from the checkpoint
    assert len({first, second, with_data.result("seeded:3")}) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_with_another_number_of_ranks_changes_almost_nothing(other_ranks, stage):
    expected = other_ranks.result(f"resumed_in_stage:{stage}")["whole"]["losses"]
    on_one_rank = other_ranks.result(f"in_stage_again:{stage}:5")
    continued = other_ranks.result(f"in_stage_again:{stage}:6")
    assert on_one_rank["state"]["world_size"] == 1
    assert list(on_one_rank["losses"]) == ["4", "5"]
    assert list(continued["losses"]) == ["6"]
    for step, loss in (on_one_rank["losses"] | continued["losses"]).items():
        assert loss == pytest.approx(expected[step], rel=1e-6), step
    whole, parts = (
        load_file(other_ranks.folder / f"{name}{stage}/checkpoints/step_00000006/ema.safetensors")
        for name in ("whole", "parts")
    )
    assert set(whole) == set(parts)
    differences = torch.cat(
        [(parts[name].float() - average.float()).abs().flatten() for name, average in whole.items()]
    )
    assert differences.max() < 1e-3  # the learning rate: Adam moves a weight this far even on rounding errors
    assert differences.mean() < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_runs_in_16_bits_resume_exactly_and_with_other_ranks(other_ranks, precision):
    runs = other_ranks.result(f"resumed_in_precision:{precision}")
    expected = runs["whole"]["losses"]
    assert runs["stopped"]["losses"] | runs["resumed"]["losses"] == {step: expected[step] for step in "123"}
    again = other_ranks.result(f"in_precision_again:{precision}")["losses"]
    # On processors with native 16-bit multiplication, products depend on how images are batched.
    assert again["4"] == pytest.approx(expected["4"], rel=1e-3)


def test_damaged_sample_on_one_rank_stops_all_ranks_with_its_message(whole_runs):
    errors = [whole_runs.result("unreadable", rank)["error"] for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "training stops on all ranks: rank " in errors[0]
    assert "DataError" in errors[0]


def test_bad_samples_are_replaced_and_reported(whole_runs):
    run = whole_runs.result("bad_samples")
    assert run["state"]["position"] == 32
    events = [message for kind, _, message in run["events"] if kind == "substituted"]
    assert events
    assert all("is damaged" in message and "; replaced by " in message for message in events)


def test_changed_data_requires_accept_changes(whole_runs):
    run = whole_runs.result("changed_data")
    assert run["before"]["state"]["order_start"] == 0
    assert "data.accept_changes=true" in run["refused"]["error"]
    state = run["accepted"]["state"]
    assert (state["step"], state["position"], state["order_start"]) == (6, 24, 12)
    assert state["order_fingerprint"] != run["before"]["state"]["order_fingerprint"]
    assert ["data", 3, "changed: a new order starts at image 12 of the run"] in run["accepted"]["events"]


def test_traffic_is_reported(whole_runs):
    assert whole_runs.result("uninterrupted")["requests"] > 0


def test_a_checkpoint_of_another_run_is_refused(whole_runs):
    for rank in (0, 1):
        error = whole_runs.result("misfits", rank)["seed"]["error"]
        assert "CheckpointError" in error
        assert "another data order" in error


def test_another_zero_stage_keeps_weights_and_average_and_reports_the_reset(whole_runs):
    runs = whole_runs.result("other_stages")
    whole = runs["whole"]["losses"]
    assert runs["to 3"]["losses"] == {step: whole[step] for step in "123"}
    assert runs["to 5"]["losses"]["4"] == pytest.approx(whole["4"], rel=1e-5)  # computed from the same weights
    for to, before in (("to 5", 1), ("to 6", 3)):
        message = f"training.zero.stage was {before}: weights are kept, optimizer state is reset"
        assert message in [text for kind, _, text in runs[to]["events"] if kind == "weights"]
    assert runs["to 6"]["state"]["zero_stage"] == 0
    saved = (whole_runs.folder / f"crossed1/checkpoints/step_{step:08d}/ema.safetensors" for step in (5, 6))
    averages = [load_file(path) for path in saved]
    assert all(averages[0][name].shape == value.shape for name, value in averages[1].items())
