import pickle
import random

import pytest

from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.config import SpikeConfig
from m2f.trainer.data import unskipped_ranges
from m2f.trainer.errors import LossSpikeError, OutOfMemoryError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import Adjustments, SkipPositions, SmallerMicroBatch, adjust, read_adjustments
from m2f.trainer.recovery.spikes import LossHistory
from m2f.trainer.state import TrainState

CONFIG = SpikeConfig(window=50, threshold=8.0, steps=3)


def history_of(losses, config=CONFIG):
    history = LossHistory()
    for step, loss in enumerate(losses):
        history = history.after(loss, 10 * step, config)
    return history


def noise(count):
    draw = random.Random(0)
    return [5 + draw.gauss(0, 0.3) for _ in range(count)]


def test_ordinary_noise_is_not_a_spike():
    history = LossHistory()
    for step, loss in enumerate(noise(2000)):
        history = history.after(loss, step, CONFIG)
        assert history.high == 0
    assert len(history.recent) == 50


def test_a_spike_is_counted_from_its_first_step():
    history = history_of([*noise(60), 50.0, 60.0, 70.0])
    assert (history.high, history.start) == (3, 600)
    assert history_of([*noise(60), 50.0, 60.0, 5.0]).high == 0
    assert history_of([*noise(60), 50.0, 5.0, 70.0]).start == 620


def test_without_a_full_window_nothing_is_a_spike():
    assert history_of([*noise(49), 1e6]).high == 0


def test_a_constant_loss_has_a_tolerance():
    assert history_of([2.0] * 60 + [2.01]).high == 0
    assert history_of([2.0] * 60 + [2.5]).high == 1


def test_loss_history_is_part_of_the_state():
    state = TrainState(order_fingerprint="a", seed=0, world_size=1, zero_stage=1, losses=history_of(noise(60)))
    assert TrainState.from_json(state.to_json(), "state.json") == state


@pytest.mark.parametrize(("position", "inside"), [(24, False), (28, True), (32, True), (36, False)])
def test_state_within_the_range_of_a_spike_is_recognised(position, inside):
    state = TrainState(order_fingerprint="a", seed=0, world_size=1, zero_stage=1, position=position)
    assert state.inside(PositionRange(24, 32)) == inside


@pytest.mark.parametrize(
    ("position", "stretches"),
    [
        (0, [(0, 3), (5, 5), (12, None)]),
        (12, [(5, 5), (12, None)]),
        (16, [(5, 5), (12, None)]),
        (20, [(5, 5), (12, None)]),
        (40, [(12, None)]),
        (80, [(20, None)]),
    ],
)
def test_steps_between_skipped_ranges_are_kept(position, stretches):
    assert unskipped_ranges(position, [PositionRange(40, 48), PositionRange(12, 20)], 4) == stretches


def test_adjustments_are_stored_and_read_back(tmp_path):
    storage, folder = Storage(), str(tmp_path / "run")
    assert read_adjustments(storage, folder) == Adjustments()
    adjust(storage, folder, SmallerMicroBatch(2), "memory")
    kept = adjust(storage, folder, SkipPositions(PositionRange(8, 16)), "spike")
    assert kept == read_adjustments(storage, folder) == Adjustments(2, (PositionRange(8, 16),), ("memory", "spike"))
    (tmp_path / "run" / "adjustments.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adjustments\.json cannot be read"):
        read_adjustments(storage, folder)


@pytest.mark.parametrize("error", [OutOfMemoryError("full", 4), LossSpikeError("high", 8, 16)])
def test_errors_can_be_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(("setting", "value"), [("window", 1), ("threshold", 0.0), ("steps", 0)])
def test_invalid_settings_are_refused(setting, value):
    with pytest.raises(ConfigError, match=f"SpikeConfig: {setting} is {value}; it must be"):
        SpikeConfig(**{setting: value})
