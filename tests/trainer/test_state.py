import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from m2f.trainer.checkpoint.random_state import load_random_state, save_random_state
from m2f.trainer.errors import CheckpointError
from m2f.trainer.state import TrainState

STATE = TrainState(order_fingerprint="abc", seed=3, world_size=2, zero_stage=1)


def test_applied_step_is_counted_and_skipped_step_only_consumes_samples():
    after = STATE.advance(16, applied=True)
    assert (after.step, after.position, after.skipped) == (1, 16, 0)
    skipped = after.advance(16, applied=False).advance(16, applied=False)
    assert (skipped.step, skipped.position, skipped.skipped, skipped.skipped_total) == (1, 48, 2, 2)
    assert skipped.advance(16, applied=True).skipped == 0


def test_state_round_trips_through_json():
    state = STATE.advance(16, applied=True)
    assert TrainState.from_json(state.to_json(), "state.json") == state


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"step": 1}', b'{"unknown": 1}'])
def test_invalid_state_is_refused(content):
    with pytest.raises(CheckpointError, match="here/state"):
        TrainState.from_json(content, "here/state.json")


def test_checkpoint_of_another_data_order_is_refused():
    assert replace(STATE, step=4).with_order("abc", "run/checkpoints/step_00000001", False).step == 4
    with pytest.raises(CheckpointError, match="another data order"):
        STATE.with_order("xyz", "run/checkpoints/step_00000001", False)


def test_accepted_data_changes_start_a_new_order():
    state = replace(STATE, position=64, order_fingerprint="old")
    changed = state.with_order("abc", "run/checkpoints/step_00000001", True)
    assert (changed.order_fingerprint, changed.order_start, changed.position) == ("abc", 64, 64)
    later = changed.advance(16, applied=True)
    assert later.with_order("abc", "run/checkpoints/step_00000002", True) == later


def test_random_states_are_restored(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        draw()
        save_random_state(tmp_path / "rank.pt")
        expected = [draw(), draw()]
        load_random_state(tmp_path / "rank.pt")
        assert [draw(), draw()] == expected
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
