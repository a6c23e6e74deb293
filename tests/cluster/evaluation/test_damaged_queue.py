"""Tests that the next start of a run rebuilds a damaged evaluation queue from commits and results."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from m2f.cluster.evaluation.queue import EvaluationQueue, queue_url, read_entries
from m2f.cluster.evaluation.rebuild import DELETED, SUPERSEDED, restore_queue
from m2f.cluster.evaluation.service import evaluation_folder
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import parse_recipe
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.errors import EvaluationError
from m2f.trainer.checkpoint.commits import read_commits, record_commit, withdraw_commit
from m2f.trainer.checkpoint.folder import (
    EVALUATION_PIN,
    MANIFEST,
    WEIGHTS,
    CheckpointManifest,
    FileEntry,
    checkpoint_url,
    pins,
)
from m2f.trainer.checkpoint.lease import hold_lease
from m2f.trainer.reporting import CommittedCheckpoint

RECIPE = """
name: run
datasets: {train: {shards: shards}, val: {shards: shards}}
data: {train: [{dataset: train}]}
training: {max_steps: 50}
evaluation: {sets: [{dataset: val}, {dataset: val, name: small, limit: 5}]}
"""
DAMAGED = '[{"step": 10, "check'


@dataclass(frozen=True)
class Run:
    """A run folder, with methods that write the files of ranks and evaluations."""

    config: RunConfig
    storage: Storage

    def commit(self, step: int, sha256: str) -> str:
        url = checkpoint_url(self.config.run_folder, step, 1)
        manifest = CheckpointManifest(step, 1, 1, {WEIGHTS: FileEntry(7, sha256)}).to_json()
        self.storage.put(join(url, WEIGHTS), b"weights")
        self.storage.put(join(url, MANIFEST), manifest)
        record_commit(self.storage, CommittedCheckpoint(step, url), manifest)
        return url

    def delete(self, url: str) -> None:
        for name in (MANIFEST, WEIGHTS):
            self.storage.delete(join(url, name))

    def evaluate(self, step: int, sha256: str | None, quality: float, sets: tuple[str, ...] = ("val", "small")) -> None:
        settings = None if sha256 is None else {"weights": sha256}
        content = {"step": step, "settings": settings, "metrics": {"PQ": quality, "AP": None}}
        for name in sets:
            url = join(self.config.run_folder, evaluation_folder(step), name, "results.json")
            self.storage.put(url, json.dumps(content).encode())

    def damage(self) -> None:
        self.storage.put(queue_url(self.config), DAMAGED.encode())

    def statuses(self) -> list[tuple[int, str]]:
        return [(entry.step, entry.status) for entry in read_entries(self.storage, queue_url(self.config))]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(parse_recipe(RECIPE, [f"output={tmp_path}"]), Storage())


@pytest.mark.parametrize(
    "content",
    [
        "",
        DAMAGED,
        "7",
        '[{"strange": 1}]',
        '[{"step": "4", "checkpoint": "c", "queued_ms": 1}]',
        '[{"step": 4, "checkpoint": "c", "queued_ms": 1, "status": "odd"}]',
        '[{"step": 4, "checkpoint": "c", "queued_ms": 1, "metrics": 7}]',
    ],
)
def test_reading_a_damaged_queue_raises_an_error_with_the_remedy(tmp_path, content):
    path = tmp_path / "queue.json"
    path.write_text(content)
    with pytest.raises(
        EvaluationError, match=r"queue\.json is not a valid evaluation queue .*; `m2f train` rebuilds it from"
    ):
        read_entries(Storage(), str(path))


def test_intact_and_missing_queues_are_not_rebuilt(run):
    assert restore_queue(run.config, run.storage) is None
    assert not run.storage.exists(queue_url(run.config))
    run.commit(10, "aa")
    EvaluationQueue(run.storage, queue_url(run.config)).update(read_commits(run.storage, run.config.run_folder))
    before = run.storage.get(queue_url(run.config))
    assert restore_queue(run.config, run.storage) is None
    assert run.storage.get(queue_url(run.config)) == before


def test_ends_of_drivers_do_not_count_as_deaths_of_the_service(run):
    run.commit(10, "aa")
    for _ in range(9):
        restore_queue(run.config, run.storage)
        taken, _ = EvaluationQueue(run.storage, queue_url(run.config)).take("every")
        assert taken.starts == 1
    again, _ = EvaluationQueue(run.storage, queue_url(run.config)).take("every")
    assert again.starts == 2  # a service of the same driver


@pytest.mark.parametrize("silent", ["queue.json", "results.json"])
def test_an_outage_neither_rebuilds_the_queue_nor_drops_results(run, silent, monkeypatch):
    run.commit(10, "aa")
    run.evaluate(10, "aa", 41.0)
    EvaluationQueue(run.storage, queue_url(run.config)).update(read_commits(run.storage, run.config.run_folder))
    if silent == "results.json":
        run.damage()
    before, get = run.storage.get(queue_url(run.config)), run.storage.get

    def fail(url):
        if url.endswith(silent):
            raise OutageError(f"{url}: no answer")
        return get(url)

    monkeypatch.setattr(run.storage, "get", fail)
    with pytest.raises(OutageError, match=f"{silent}: no answer"):
        restore_queue(run.config, run.storage)
    assert get(queue_url(run.config)) == before


def test_rebuilt_queue_publishes_results_of_the_same_weights_and_queues_the_rest(run):
    run.commit(10, "aa")
    run.evaluate(10, "aa", 41.0)
    run.commit(20, "bb")
    run.evaluate(20, "other", 42.0)  # results of other weights, as of a withdrawn commit
    run.commit(30, "cc")
    run.evaluate(30, "cc", 43.0, sets=("val",))  # the process died before the second set
    last = run.commit(40, "dd")
    run.damage()
    message = restore_queue(run.config, run.storage)
    assert message is not None
    assert "rebuilt from commits and results: 1 published, 3 to evaluate" in message
    assert run.statuses() == [(10, "published"), (20, "waiting"), (30, "waiting"), (40, "waiting")]
    assert read_entries(run.storage, queue_url(run.config))[0].metrics == {"val/PQ": 41.0, "small/PQ": 41.0}
    assert pins(run.storage, last) == (EVALUATION_PIN,)
    assert run.storage.get(queue_url(run.config) + ".damaged") == DAMAGED.encode()
    queue = EvaluationQueue(run.storage, queue_url(run.config))
    assert queue.update(read_commits(run.storage, run.config.run_folder)) == ()  # every commit already has an entry
    assert [entry.step for entry in queue.entries()] == [10, 20, 30, 40]


def test_waiting_checkpoints_of_a_run_that_did_not_evaluate_before_are_pinned(run):
    deleted, evaluated, waiting = (run.commit(step, "aa") for step in (10, 20, 30))
    run.delete(deleted)
    queue = EvaluationQueue(run.storage, queue_url(run.config))
    queue.update(read_commits(run.storage, run.config.run_folder))
    queue.publish(queue.entries()[1], {"val/PQ": 41.0})
    added = run.commit(40, "bb")
    assert restore_queue(run.config, run.storage) is None
    found = {url: pins(run.storage, url) for url in (deleted, evaluated, waiting, added)}
    assert found == {deleted: (), evaluated: (), waiting: (EVALUATION_PIN,), added: (EVALUATION_PIN,)}


def test_deleted_checkpoint_with_results_is_published_if_its_step_was_committed_once(run):
    run.delete(run.commit(10, "aa"))
    run.evaluate(10, "aa", 41.0)
    run.delete(run.commit(20, "bb"))
    run.delete(run.commit(30, "cc"))
    run.evaluate(30, None, 42.0)  # without settings, as in version 0.1
    run.damage()
    restore_queue(run.config, run.storage)
    assert run.statuses() == [(10, "published"), (20, "dropped"), (30, "published")]
    assert read_entries(run.storage, queue_url(run.config))[1].detail == DELETED


def test_rebuilt_queue_keeps_results_of_checkpoints_that_earlier_drivers_deleted(run):
    urls = {}
    with hold_lease(run.storage, run.config.run_folder):
        for step in (10, 20, 30):
            urls[step] = run.commit(step, f"{step}")
            run.evaluate(step, f"{step}", step + 31.0)
        run.delete(urls[10])
    with hold_lease(run.storage, run.config.run_folder):
        run.delete(urls[20])
    with hold_lease(run.storage, run.config.run_folder):
        run.commit(40, "late")  # by the first driver, which has lost the run
        run.damage()
        restore_queue(run.config, run.storage)
    assert run.statuses() == [(10, "published"), (20, "published"), (30, "published")]


def test_step_committed_again_replaces_metrics_of_the_withdrawn_commit(run):
    url = run.commit(10, "aa")
    run.evaluate(10, "aa", 41.0)
    withdraw_commit(run.storage, url)
    run.commit(10, "bb")
    run.damage()
    restore_queue(run.config, run.storage)
    assert run.statuses() == [(10, "withdrawn"), (10, "waiting")]
    queue = EvaluationQueue(run.storage, queue_url(run.config))
    again, _ = queue.take("every")
    assert again is not None
    assert queue.replaces(again)


def test_policy_latest_queues_only_checkpoints_newer_than_the_published_ones(run):
    config = parse_recipe(RECIPE, [f"output={run.config.output}", "evaluation.policy=latest"])
    for step, sha256 in ((10, "aa"), (20, "bb"), (30, "cc")):
        run.commit(step, sha256)
    run.evaluate(20, "bb", 42.0)
    run.damage()
    restore_queue(config, run.storage)
    assert run.statuses() == [(10, "dropped"), (20, "published"), (30, "waiting")]
    assert read_entries(run.storage, queue_url(config))[0].detail == SUPERSEDED


@pytest.mark.parametrize("content", ["", "[1]", '{"metrics": 3}', '{"settings": 4, "metrics": {}}'])
def test_checkpoint_with_damaged_results_is_queued_again(run, content):
    run.commit(10, "aa")
    run.evaluate(10, "aa", 41.0)
    run.storage.put(join(run.config.run_folder, evaluation_folder(10), "val", "results.json"), content.encode())
    run.damage()
    restore_queue(run.config, run.storage)
    assert run.statuses() == [(10, "waiting")]
