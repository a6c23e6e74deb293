"""Tests of local runs of two ranks: out of memory, loss spikes, killed ranks, and metrics that the driver missed."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import m2f.trainer.checkpoint.saver
from m2f.cluster.train.local import train_locally
from m2f.cluster.train.local_rank import train_rank
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.trainer.checkpoint.commits import record_commit
from m2f.trainer.config import CheckpointConfig, SpikeConfig
from m2f.trainer.errors import CheckpointError
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import read_adjustments
from tests.cluster.tiny_run import (
    changed_losses,
    out_of_memory,
    small_sets,
    spike,
    tiny_config,
    with_small_evaluation,
)

pytestmark = pytest.mark.slow
STEPS = 10


def rank_with(change, job, post):
    """Run `train_rank` with losses that `change` modifies."""
    with changed_losses(change):
        train_rank(job, post)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_local")
    datasets = small_sets(str(folder), Storage())

    def make(name, **training):
        config = replace(tiny_config(folder, name, datasets), evaluation=EvaluationConfig())
        settings = {"max_steps": STEPS, "checkpoint": CheckpointConfig(every_steps=4, keep=9), **training}
        return replace(config, training=replace(config.training, **settings))

    make.evaluation = with_small_evaluation(tiny_config(folder, "any", datasets)).evaluation
    return make


@pytest.fixture(scope="module")
def baseline(make_config):
    config = make_config("baseline")
    assert train_locally(config).status == "finished"
    return logged_losses(config)


@pytest.fixture
def with_fault(monkeypatch):
    return lambda change: monkeypatch.setattr("m2f.cluster.train.local.train_rank", partial(rank_with, change))


def logged_losses(config):
    """Return the total losses in MLflow by step."""
    from mlflow import MlflowClient

    from m2f.cluster.tracking.tracking import create_run

    run = create_run(config)
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "train/loss/total")
    return {point.step: point.value for point in points}


def stored_status(tracked):
    """Return the status of a run in MLflow."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracked.uri).get_run(tracked.run_id).info.status


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_losses(make_config, baseline, with_fault, capsys):
    config = make_config("small")
    with_fault(partial(out_of_memory, 21))  # sixth step, rank 1 of 2
    assert train_locally(config).status == "finished"
    output = capsys.readouterr().err
    assert "out of memory in step 6 with 2 images at once (training.micro_batch): CUDA out of memory" in output
    assert "restarting in 0 s: with 1 image per micro-batch instead of 2" in output
    assert logged_losses(config) == pytest.approx(baseline, rel=1e-6)
    (reason,) = json.loads((Path(config.run_folder) / "adjustments.json").read_text())["reasons"]
    assert "with 1 image per micro-batch instead of 2" in reason
    assert read_adjustments(Storage(), config.run_folder).micro_batch == 1


def test_loss_spike_is_rolled_back_and_its_samples_are_skipped(make_config, baseline, with_fault, capsys):
    spikes = SpikeConfig(action="roll_back", window=4, threshold=20.0, steps=2)
    config = make_config("spiky", spikes=spikes, checkpoint=CheckpointConfig(every_steps=3, keep=9))
    with_fault(partial(spike, 20))  # sixth and seventh step
    assert train_locally(config).status == "finished"
    assert "positions 20 to 27 of the data order" in capsys.readouterr().err
    assert read_adjustments(Storage(), config.run_folder).skipped == (PositionRange(20, 28),)
    checkpoints = Path(config.run_folder) / "checkpoints"
    positions = [
        json.loads((checkpoints / f"step_{step:08d}-1/state.json").read_text())["position"] for step in (3, 6, 9)
    ]
    assert positions == [12, 32, 44]  # step 6 was repeated with samples after the spike
    losses = logged_losses(config)
    assert {step: losses[step] for step in range(1, 6)} == {step: baseline[step] for step in range(1, 6)}


def killed_rank(marker, job, post):
    """Run `train_rank`, and kill rank 1 once, in step 6."""

    def kill(losses, targets):
        if (targets.position >= 20).any() and os.environ["RANK"] == "1" and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    with changed_losses(kill):
        train_rank(job, post)


def test_killed_rank_is_restarted_and_checkpoints_are_evaluated_at_the_end(
    make_config, baseline, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("m2f.cluster.train.local.train_rank", partial(killed_rank, str(tmp_path / "marker")))
    config = replace(make_config("killed"), evaluation=make_config.evaluation)
    summary = train_locally(config)
    assert summary.status == "finished"
    assert [failure.kind for failure in summary.failures] == ["death"]
    assert ": RankDiedError: rank 1 was killed by SIGKILL" in capsys.readouterr().err
    assert logged_losses(config) == baseline  # bit-identical
    assert [(entry.step, entry.status) for entry in summary.evaluations] == [(s, "published") for s in (4, 8, 10)]
    results = json.loads((Path(config.run_folder) / "evaluations/step_00000010/val/results.json").read_text())
    assert results["metrics"]["PQ"] == summary.evaluations[-1].metrics["val/PQ"]
    assert not list(Path(config.run_folder).glob("checkpoints/*/pins/*"))
    assert train_locally(config).evaluations == summary.evaluations  # nothing is left to do
    queue = Path(config.run_folder) / "evaluations/queue.json"
    queue.write_text(queue.read_text()[:200])
    capsys.readouterr()
    rebuilt = train_locally(config).evaluations
    assert [replace(entry, queued_ms=0) for entry in summary.evaluations] == list(rebuilt)
    assert "rebuilt from commits and results: 3 published, 0 to evaluate" in capsys.readouterr().err


def test_run_ends_with_a_message_if_evaluations_stop(make_config, monkeypatch, capsys):
    def fail(storage, run_folder):
        raise CheckpointError("lease/000001 cannot be read")

    monkeypatch.setattr("m2f.cluster.evaluation.service.read_commits", fail)
    config = replace(make_config("unevaluated", max_steps=4), evaluation=make_config.evaluation)
    assert train_locally(config).status == "finished"
    message = "evaluations stopped: CheckpointError: lease/000001 cannot be read. Start the run again to evaluate"
    assert capsys.readouterr().err.count(message) == 1
    monkeypatch.undo()
    assert [entry.status for entry in train_locally(config).evaluations] == ["published"]


def test_run_whose_last_evaluations_are_interrupted_is_stopped(make_config, monkeypatch):
    def interrupt(evaluations):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("m2f.cluster.train.local.LocalEvaluations.training_ended", interrupt)
    config = replace(make_config("interrupted", max_steps=4), evaluation=make_config.evaluation)
    summary = train_locally(config)
    assert (summary.status, summary.checkpoint.step, stored_status(summary.tracked)) == ("stopped", 4, "KILLED")
    monkeypatch.undo()
    summary = train_locally(config)
    assert (summary.status, stored_status(summary.tracked)) == ("finished", "FINISHED")
    assert [entry.status for entry in summary.evaluations] == ["published"]


def test_metrics_missed_by_the_driver_are_logged_at_the_next_start(make_config, baseline, monkeypatch):
    config = make_config("deaf")
    monkeypatch.setattr("m2f.cluster.train.relay.RunRelay.report", lambda self, event: None)
    monkeypatch.setattr("m2f.cluster.train.relay.RunRelay.track_stored", lambda self, storage, folder: None)
    assert train_locally(config).status == "finished"
    assert logged_losses(config) == {}
    monkeypatch.undo()
    assert train_locally(config).status == "finished"
    assert logged_losses(config) == baseline


def rank_lost_at_commit(marker, step, job, post):
    """Run `train_rank`, and kill rank 0 once, between writing the manifest of `step` and recording its commit."""

    def die(storage, checkpoint, manifest):
        if checkpoint.step == step and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record_commit(storage, checkpoint, manifest)

    m2f.trainer.checkpoint.saver.record_commit = die
    train_rank(job, post)


@pytest.mark.parametrize("step", [4, STEPS])
def test_rank_killed_during_commit_loses_no_metrics_and_no_evaluation(
    make_config, baseline, tmp_path, monkeypatch, step
):
    lost = partial(rank_lost_at_commit, str(tmp_path / "marker"), step)
    monkeypatch.setattr("m2f.cluster.train.local.train_rank", lost)
    config = replace(make_config(f"lost{step}"), evaluation=make_config.evaluation)
    summary = train_locally(config)
    assert (tmp_path / "marker").exists()
    assert summary.status == "finished"
    assert [(entry.step, entry.status) for entry in summary.evaluations] == [(s, "published") for s in (4, 8, 10)]
    assert logged_losses(config) == baseline
