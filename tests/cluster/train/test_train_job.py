"""Integration tests of training with Ray, DeepSpeed and MLflow on a tiny model, in which processes are killed."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray.train import ControllerError, WorkerGroupError

from m2f.cluster.evaluation.client import NAMESPACE, EvaluationClient
from m2f.cluster.evaluation.offline import evaluate_checkpoint
from m2f.cluster.evaluation.queue import queue_url, read_entries
from m2f.cluster.ray_cluster import ClusterError, connect
from m2f.cluster.recipe.config import RunConfig, TrackingConfig
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.tracking import create_run
from m2f.cluster.train.failure_policy import classify_attempt
from m2f.cluster.train.ray_launcher import RayLauncher, check_gpus, run_training
from m2f.cluster.train.supervisor import RunSummary
from m2f.data_pipeline.config import (
    StorageConfig,
)
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import list_checkpoints
from m2f.trainer.config import CheckpointConfig, SpikeConfig
from m2f.trainer.job import PositionRange
from m2f.trainer.recovery.adjustments import read_adjustments
from m2f.trainer.recovery.ending import Ending
from tests.cluster import tiny_run
from tests.cluster.tiny_run import EVERY, STEPS, small_sets, tiny_config
from tests.ray_private import WorkerGroupStartupTimeoutError
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train_job")


@pytest.fixture(scope="module")
def datasets(folder):
    return small_sets(str(folder), Storage())


@pytest.fixture(scope="module")
def config(folder, datasets):
    return tiny_config(folder, "disturbed", datasets)


@pytest.fixture(scope="module")
def cluster(config):
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", "test")  # every process of the cluster inherits them
    with connect(config):
        yield
    patch.undo()


@pytest.mark.parametrize(
    ("error", "ending", "kind", "rank"),
    [
        (WorkerGroupError("", {0: RuntimeError("Connection reset by peer"), 1: KeyError("x")}), None, "mistake", 1),
        (ControllerError(TimeoutError("no workers")), None, "error", None),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), None, "resources", None),
        (WorkerGroupError("", {0: KeyError("x")}), Ending("stalled", "rank 1 sleeps"), "death", None),
        (None, Ending("drained", ""), "preemption", None),
        (None, None, "error", None),
    ],
)
def test_errors_raised_by_ray_are_classified(config, error, ending, kind, rank):
    launcher = RayLauncher(config)
    launcher._error = error
    failure = classify_attempt(launcher.attempt_error(), ending)
    assert (failure.kind, failure.rank) == (kind, rank)


def ray_processes(title: str) -> list[psutil.Process]:
    """Return the descendants of this process whose title contains `title`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and title in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def history(config: RunConfig, metric: str) -> list[tuple[int, float]]:
    run = create_run(config)
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, metric)
    return sorted((p.step, p.value) for p in points)


@pytest.fixture(scope="module")
def summary(cluster, config) -> RunSummary:
    """Train, kill one worker right after the first checkpoint, and return the summary."""

    def kill_a_worker() -> None:
        wait_until(lambda: list_checkpoints(Storage(), config.run_folder))
        os.kill(ray_processes("RayTrainWorker")[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    summary = run_training(config)
    killer.join()
    return summary


def test_killed_worker_does_not_change_losses(summary, config, baseline_run):
    assert summary.status == "finished"
    assert [failure.kind for failure in summary.failures] == ["death"]
    assert summary.checkpoint is not None
    assert summary.checkpoint.step == STEPS
    losses = history(config, "train/loss/total")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))  # every step once
    assert losses == baseline_run.losses  # bit-identical


def test_every_checkpoint_is_evaluated_and_published_once(summary, config):
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert [(e.step, e.status) for e in summary.evaluations] == [(step, "published") for step in steps]
    assert [step for step, _ in history(config, "val/PQ")] == steps
    assert [step for step, _ in history(config, "val/boundary_PQ")] == steps
    memory = history(config, "train/evaluation/peak_host_memory_gb")
    assert memory
    assert {step for step, _ in memory} <= set(steps)
    assert all(0.1 < gigabytes < 2 for _, gigabytes in memory)
    for entry in summary.evaluations:
        folder = Path(config.run_folder) / "evaluations" / f"step_{entry.step:08d}" / "val"
        results = json.loads((folder / "results.json").read_text())
        assert results["num_images"] == 20
        assert results["metrics"]["PQ"] == entry.metrics["val/PQ"]
        assert (folder / "panels.jpg").stat().st_size > 1000
    pins = [url for url in Storage().list(f"{config.run_folder}/checkpoints") if "/pins/" in url]
    assert pins == []


def test_offline_evaluation_gives_the_same_results(summary, config):
    (evaluation,) = evaluate_checkpoint(config, summary.checkpoint.url, STEPS)
    for name, data in evaluation.files().items():
        assert (Path(config.run_folder) / f"evaluations/step_{STEPS:08d}/val" / name).read_bytes() == data


def test_killing_evaluation_service_and_actor_does_not_change_results(summary, config):
    again = replace(config, name="evaluated-again")
    for part in ("lease", "checkpoints", "commits"):
        shutil.copytree(f"{config.run_folder}/{part}", f"{again.run_folder}/{part}")
    client = EvaluationClient(again, create_run(again))
    wait_until(lambda: (status := client.status()) and status.current)
    os.kill(ray_processes("EvaluationActor")[0].pid, signal.SIGKILL)
    wait_until(lambda: any(entry.settled for entry in read_entries(Storage(), queue_url(again))))
    os.kill(ray_processes("EvaluationService")[0].pid, signal.SIGKILL)
    wait_until(lambda: (status := client.status()) and len(status.entries) == 3 and status.idle)
    client.close()
    entries = read_entries(Storage(), queue_url(again))
    assert [(e.step, e.status, e.metrics) for e in entries] == [
        (e.step, "published", e.metrics) for e in summary.evaluations
    ]
    assert [(e.step, e.metrics["val/PQ"]) for e in entries] == history(again, "val/PQ")
    for step in range(EVERY, STEPS + 1, EVERY):
        first, second = (Path(c.run_folder) / f"evaluations/step_{step:08d}/val" for c in (config, again))
        for name in ("results.json", "panels.jpg"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


def test_evaluation_service_ends_if_its_driver_stays_silent(cluster, config, monkeypatch):
    monkeypatch.setattr("m2f.cluster.evaluation.client.DRIVER_SILENCE_S", 5.0)
    abandoned = replace(config, name="abandoned")
    client = EvaluationClient(abandoned, create_run(abandoned))
    wait_until(lambda: ray_processes("EvaluationService"))
    wait_until(lambda: not ray_processes("EvaluationService"))
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(client._name, namespace=NAMESPACE)


def test_run_trains_evaluates_and_continues_in_object_storage(cluster, folder, s3_endpoint):
    bucket = StorageConfig(endpoint_url=s3_endpoint, region="us-east-1")
    storage = Storage(bucket)
    local = tiny_config(folder, "remote", small_sets("s3://box/shards", storage))
    config = replace(
        local,
        output="s3://box/runs",
        storage=bucket,
        training=replace(local.training, max_steps=EVERY),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/remote.db"),
    )
    summary = run_training(config)
    assert summary.status == "finished"
    assert summary.checkpoint.url == f"s3://box/runs/remote/checkpoints/step_{EVERY:08d}-1"
    assert [(entry.step, entry.status) for entry in summary.evaluations] == [(EVERY, "published")]
    assert [step for step, _ in history(config, "val/PQ")] == [EVERY]
    (evaluation,) = evaluate_checkpoint(config, summary.checkpoint.url, EVERY)
    published = f"s3://box/runs/remote/evaluations/step_{EVERY:08d}/val"
    assert {name: storage.get(f"{published}/{name}") for name in evaluation.files()} == evaluation.files()
    longer = run_training(replace(config, training=replace(config.training, max_steps=EVERY + 1)))
    assert longer.checkpoint.step == EVERY + 1
    assert [step for step, _ in history(config, "train/loss/total")] == list(range(1, EVERY + 2))


def test_evaluation_client_gives_up_if_the_service_cannot_start(cluster, config, tmp_path, monkeypatch):
    monkeypatch.setattr("m2f.cluster.evaluation.client.MAX_REPLACEMENTS", 1)
    tracked = replace(create_run(replace(config, name="lost")), spool=str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("no folder")
    client = EvaluationClient(config, tracked)
    wait_until(lambda: client.status() or client.failure_reason)
    assert "NotADirectoryError" in client.failure_reason
    client.close()


def test_user_error_stops_the_run_with_its_own_message(cluster, config):
    settings = replace(config.model.backbone, name="resnet10x")
    wrong = replace(config, name="wrong", model=replace(config.model, backbone=settings))
    with pytest.raises(ConfigError, match="resnet10x"):
        run_training(wrong)
    assert read_entries(Storage(), f"{wrong.run_folder}/evaluations/queue.json") == ()


@pytest.fixture
def workers_with(monkeypatch):
    """Return a function that makes workers run another loop of `tiny_run`, which they cannot import."""
    ray.cloudpickle.register_pickle_by_value(tiny_run)
    yield lambda loop: monkeypatch.setattr("m2f.cluster.train.ray_launcher.train_loop", loop)
    ray.cloudpickle.unregister_pickle_by_value(tiny_run)


def test_bug_on_one_rank_stops_the_run_and_is_reported_first(cluster, config, workers_with, capsys):
    workers_with(tiny_run.buggy_loop)
    training = replace(config.training, collective_timeout_s=900.0)
    buggy = replace(config, name="buggy", evaluation=EvaluationConfig(), training=training)
    summary = run_training(buggy)
    # Other ranks wait for the failed one in a collective operation, whose timeout the report must not wait for.
    assert time.time() - (Path(buggy.run_folder) / "mistake").stat().st_mtime < 600
    assert summary.status == "failed"
    assert [(failure.rank, failure.kind) for failure in summary.failures] == [(1, "mistake")]
    output = capsys.readouterr().err.splitlines()
    assert any("more objects than the model has queries" in line for line in output)
    lines = [line for line in output if not line.startswith(("warning: ", "no report from the workers"))]
    assert lines[0] == "attempt 1 ended on rank 1 after checkpoint step 0: ValueError: the colour of sample 9 is wrong"
    assert lines[-1] == "  giving up: a restart would fail in the same way"
    assert len(lines) == 3
    (details,) = (Path(buggy.run_folder) / "failures").iterdir()
    assert "the colour of sample 9 is wrong" in details.read_text()


def test_run_recovers_from_failed_upload_out_of_memory_and_loss_spike(
    cluster, config, baseline_run, workers_with, capsys
):
    """The upload of step 4 is refused, rank 1 runs out of memory in step 5, and the loss spikes in steps 8 and 9.

    Step 8 is evaluated before step 9. After the roll-back, its commit is withdrawn, and the evaluation of the repeated
    step 8 replaces the first one.
    """
    workers_with(tiny_run.faulty_loop)
    spikes = SpikeConfig(action="roll_back", window=4, threshold=20.0, steps=2)
    training = replace(config.training, checkpoint=CheckpointConfig(every_steps=EVERY, keep=9), spikes=spikes)
    troubled = replace(config, name="troubled", training=training)
    summary = run_training(troubled)
    assert summary.status == "finished"
    assert [failure.kind for failure in summary.failures] == ["error", "memory", "spike"]
    refused, short, spiked = capsys.readouterr().err.split("attempt ")[1:]
    assert "ended on rank 1 after checkpoint step 0: StorageError: " in refused
    assert "optim_states.pt: the store refuses to write (AccessDenied)" in refused
    assert (
        "ended on rank 1 after checkpoint step 4: OutOfMemoryError: out of memory in step 5 with 2 images at" in short
    )
    assert "restarting in 0 s: with 1 image per micro-batch instead of 2" in short
    assert "ended on rank 0 after checkpoint step 8: LossSpikeError: after step 9 the loss is" in spiked
    assert "from the checkpoint before the spike, skipping positions 28 to 35 of the data order" in spiked
    adjustments = read_adjustments(Storage(), troubled.run_folder)
    assert (adjustments.micro_batch, adjustments.skipped) == (1, (PositionRange(28, 36),))
    checkpoints = sorted((Path(troubled.run_folder) / "checkpoints").glob("step_*/state.json"))
    positions = [json.loads(state.read_text())["position"] for state in checkpoints]
    assert positions == [16, 40, 56]  # steps 8 and 9 were repeated with other images
    losses = history(troubled, "train/loss/total")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert dict(losses[:7]) == pytest.approx(dict(baseline_run.losses[:7]), rel=1e-6)
    assert_step_8_was_evaluated_again(troubled, summary)


def assert_step_8_was_evaluated_again(config, summary):
    seen = {(entry.step, entry.status): entry for entry in summary.evaluations}
    assert sorted(seen) == [(4, "published"), (8, "published"), (8, "withdrawn"), (12, "published")]
    first, second = seen[8, "withdrawn"], seen[8, "published"]
    assert first.commit != second.commit
    shown = [value for step, value in history(config, "val/mIoU") if step == 8]  # MLflow keeps both
    assert sorted(shown) == sorted(entry.metrics["val/mIoU"] for entry in (first, second))


def test_too_few_gpus_are_reported_before_the_start():
    config = parse_recipe(
        "{name: r, datasets: {d: {shards: s}}, data: {train: [{dataset: d}]}, training: {max_steps: 1},"
        " cluster: {num_workers: 8, num_gpus_per_worker: 1},"
        " evaluation: {sets: [{dataset: d}], actors: 2, num_gpus_per_actor: 1}}"
    )
    check_gpus(config, 10, may_grow=False)
    with pytest.raises(ClusterError, match="8 GPUs for training and 2 for evaluation, but the cluster has 8"):
        check_gpus(config, 8, may_grow=False)
    check_gpus(config, 0, may_grow=True)
