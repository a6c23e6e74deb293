"""The choice of a launch config, with a fake clock."""

import pytest
import torch

from m2f.model.deform_attn.tuning import Autotuner, LaunchConfig

TABLE = (LaunchConfig(32, 4), LaunchConfig(16, 2), LaunchConfig(8, 1))


def test_fastest_config_is_chosen_and_cached_per_bucket():
    milliseconds = {TABLE[0]: 3.0, TABLE[1]: 1.0, TABLE[2]: 2.0}
    tried = []

    def clock(run):
        run()
        return milliseconds[tried[-1]]

    tuner = Autotuner(TABLE, clock)
    assert tuner.choose("small", tried.append) == TABLE[1]
    assert tried == list(TABLE)
    milliseconds[TABLE[2]] = 0.5
    assert tuner.choose("small", tried.append) == TABLE[1]
    assert tried == list(TABLE)
    assert tuner.choose("large", tried.append) == TABLE[2]
    assert tried == [*TABLE, *TABLE]


def test_first_config_wins_a_tie():
    assert Autotuner(TABLE, lambda run: 1.0).choose("all", lambda tuning: None) == TABLE[0]


@pytest.mark.parametrize(("dim", "forward"), [(24, (8, 1)), (32, (8, 1)), (48, (16, 4)), (64, (16, 4)), (128, (8, 4))])
def test_wide_heads_use_configurations_that_do_not_spill_registers(dim, forward):
    """As `python -m benchmarks.kernel_resources` shows for compute capability 9.0."""
    operator = pytest.importorskip("m2f.model.deform_attn.triton_op")
    inputs = (torch.empty(1, 6, 2, dim), None, None, torch.empty(1, 6, 2, 1, 3, 2), None)
    assert operator._launch_config(operator.FORWARD, inputs, pytest.fail) == forward
    assert forward in operator.FORWARD.table
    assert operator._launch_config(operator.BACKWARD, inputs, pytest.fail) == (16, 4)
