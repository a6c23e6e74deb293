"""Runs of two plain processes that meet what changes a run: too little memory, a spike of the loss."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from m2f.cluster.train.local import train_locally, train_rank
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.trainer.config import CheckpointConfig, SpikeConfig
from m2f.trainer.job import Window
from m2f.trainer.recovery.adjustments import read_adjustments
from tests.cluster.tiny_run import changed_losses, out_of_memory, small_sets, spike, tiny_config

pytestmark = pytest.mark.slow
STEPS = 10


def rank_with(change, job, run, live):
    """`train_rank` with a fault."""
    with changed_losses(change):
        train_rank(job, run, live)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_local")
    datasets = small_sets(str(folder), Storage())

    def make(name, **training):
        config = replace(tiny_config(folder, name, datasets), evaluation=EvaluationConfig())
        settings = {"max_steps": STEPS, "checkpoint": CheckpointConfig(every_steps=4, keep=9), **training}
        return replace(config, training=replace(config.training, **settings))

    return make


@pytest.fixture(scope="module")
def calm(make_config):
    config = make_config("calm")
    assert train_locally(config) == "finished"
    return logged_losses(config)


@pytest.fixture
def with_fault(monkeypatch):
    return lambda change: monkeypatch.setattr("m2f.cluster.train.local.train_rank", partial(rank_with, change))


def logged_losses(config):
    """Every loss that rank 0 has logged, by step, from the journal of MLflow points."""
    from mlflow import MlflowClient

    from m2f.cluster.tracking.tracking import create_run

    run = create_run(config)
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "train/loss/total")
    return {point.step: point.value for point in points}


def test_too_little_memory_halves_the_micro_batch_and_the_losses_go_on(make_config, calm, with_fault, capsys):
    config = make_config("small")
    with_fault(partial(out_of_memory, 21))  # sixth step, rank 1 of 2
    assert train_locally(config) == "finished"
    said = capsys.readouterr().err
    assert "out of memory in step 6 with 2 images at once (training.micro_batch): CUDA out of memory" in said
    assert "starting again with 1 images per micro-batch instead of 2" in said
    assert logged_losses(config) == pytest.approx(calm, rel=1e-6)
    (reason,) = json.loads((Path(config.run_folder) / "adjustments.json").read_text())["reasons"]
    assert "with 1 images per micro-batch instead of 2" in reason
    assert read_adjustments(Storage(), config.run_folder).micro_batch == 1


def test_a_spike_is_rolled_back_and_its_samples_left_out(make_config, calm, with_fault, capsys):
    spikes = SpikeConfig(action="roll_back", window=4, threshold=20.0, steps=2)
    config = make_config("spiky", spikes=spikes, checkpoint=CheckpointConfig(every_steps=3, keep=9))
    with_fault(partial(spike, 20))  # sixth and seventh step
    assert train_locally(config) == "finished"
    assert "positions 20 to 27 of the data order" in capsys.readouterr().err
    assert read_adjustments(Storage(), config.run_folder).skipped == (Window(20, 28),)
    checkpoints = Path(config.run_folder) / "checkpoints"
    positions = [
        json.loads((checkpoints / f"step_{step:08d}-1/state.json").read_text())["position"] for step in (3, 6, 9)
    ]
    assert positions == [12, 32, 44]  # that of step 6 was taken again, from behind the spike
    losses = logged_losses(config)
    assert {step: losses[step] for step in range(1, 6)} == {step: calm[step] for step in range(1, 6)}
