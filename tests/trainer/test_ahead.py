"""Tests that the host may read a step's scalars after queuing the next step, as on GPUs; run on two CPU ranks."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = ("0", "1")


@pytest.fixture(scope="module")
def runs(launcher, training_shards):
    launcher.run_each([f"ahead:{stage}" for stage in STAGES])
    return launcher


@pytest.mark.parametrize("stage", STAGES)
def test_reading_outcomes_later_does_not_change_the_results_of_a_run(runs, stage):
    seen = runs.result(f"ahead:{stage}")
    assert seen["ahead"] == seen["at once"]
    assert seen["ahead stopped"] == seen["at once stopped"]
    run = seen["ahead"]
    assert (run["state"]["step"], run["state"]["skipped_total"]) == (9, 1)
    assert {event[0] for event in run["events"]} == {"skipped", "spike", "finished"}
    assert (list(run["losses"]), run["checkpoints"]) == (["4", "8"], [6, 9])
    assert len(run["trace"]) == 10
    assert seen["ahead stopped"]["checkpoints"] == [3]  # four updates, one of them skipped


def test_step_outcome_is_read_while_the_next_step_is_queued(runs):
    order = [
        kind if kind != "finish_update" else f"finish_update {number}"
        for kind, number in runs.result("ahead:1")["order ahead"]
    ]
    second = ["compute", "finish_update 1", "update"]
    assert order[:5] == ["compute", "update", *second]
    at_once = [kind for kind, _ in runs.result("ahead:1")["order at once"]]
    assert at_once[:6] == ["compute", "update", "finish_update"] * 2
