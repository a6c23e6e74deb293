import json
import shutil
import threading
from dataclasses import asdict

import pytest

from m2f.cluster.evaluation.manager import EvaluationManager, EvaluationProgress
from m2f.cluster.evaluation.queue import Entry, EvaluationQueue, read_entries
from m2f.cluster.evaluation.service import BEST_PIN, release
from m2f.data_pipeline.errors import OutageError, StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.eval.errors import EvaluationError
from m2f.trainer.checkpoint.commits import Commit, CommitList
from m2f.trainer.checkpoint.folder import EVALUATION_PIN, MANIFEST, checkpoint_url, pin, pins
from m2f.trainer.errors import CheckpointError
from m2f.trainer.reporting import CommittedCheckpoint
from tests.waiting import PATIENCE_S, wait_until


def queue_in(folder) -> EvaluationQueue:
    return EvaluationQueue(Storage(), f"{folder}/queue.json")


def commit_of(step: int, digest: str = "a", folder: str = "c") -> Commit:
    return Commit(f"{step:08d}-1-{digest}", CommittedCheckpoint(step, f"{folder}/{step}"))


def commits_of(*steps: int) -> CommitList:
    return CommitList(tuple(commit_of(step) for step in steps))


def statuses(source) -> dict[int, str]:
    return {e.step: e.status for e in source}


def test_commit_is_queued_once_and_waits_again_after_a_crash(tmp_path):
    queue = queue_in(tmp_path)
    queue.update(commits_of(20))
    queue.update(commits_of(10, 20))
    running, _ = queue.take("every")
    assert running is not None
    assert running.step == 10
    again = queue_in(tmp_path)  # as after a crash during the evaluation of step 10
    assert statuses(again.entries()) == {10: "waiting", 20: "waiting"}
    assert again.entries()[0].queued_ms == running.queued_ms


def test_step_committed_again_is_evaluated_again(tmp_path):
    queue = queue_in(tmp_path)
    queue.update(commits_of(10, 20, 30))
    first, _ = queue.take("every")
    queue.publish(first, {"val/PQ": 1.0})
    assert not queue.replaces(first)
    after = CommitList((commit_of(10, "b"), commit_of(30)), frozenset({commit_of(10).name, commit_of(20).name}))
    marked = queue.update(after)  # the run was rolled back to before step 10
    assert [(entry.step, entry.status) for entry in marked] == [(20, "dropped"), (10, "withdrawn")]
    assert queue.update(after) == ()
    second, _ = queue.take("every")
    assert (second.step, second.commit) == (10, commit_of(10, "b").name)
    assert queue.replaces(second)
    queue.publish(second, {"val/PQ": 2.0})
    assert [(e.step, e.status) for e in queue.entries()] == [
        (10, "withdrawn"),
        (10, "published"),
        (20, "dropped"),
        (30, "waiting"),
    ]


def test_recommit_of_the_same_bytes_undoes_the_withdrawal(tmp_path):
    queue = queue_in(tmp_path)
    queue.update(commits_of(10, 20))
    first, _ = queue.take("every")
    queue.publish(first, {"val/PQ": 1.0})
    queue.update(CommitList((), frozenset({commit_of(10).name, commit_of(20).name})))
    assert statuses(queue.entries()) == {10: "withdrawn", 20: "dropped"}
    queue.update(commits_of(10, 20))
    assert [(e.status, e.detail) for e in queue.entries()] == [("published", ""), ("waiting", "")]
    assert queue.entries()[0].metrics == {"val/PQ": 1.0}


def test_entries_of_version_0_1_are_matched_by_checkpoint_name_in_a_moved_run(tmp_path):
    rows = [asdict(Entry(step, f"/old/c/{step}", 5, "published")) for step in (10, 20)]
    for row in rows:
        del row["commit"], row["starts"]
    rows[1]["status"] = "waiting"
    (tmp_path / "queue.json").write_text(json.dumps(rows))
    queue = queue_in(tmp_path)
    queue.update(CommitList((commit_of(10, folder="/new/c"), commit_of(20, folder="/new/c"))))
    assert statuses(queue.entries()) == {10: "published", 20: "waiting"}
    assert [entry.commit for entry in queue.entries()] == [commit_of(10).name, commit_of(20).name]
    assert queue.take("every")[0].checkpoint == "/new/c/20"
    assert len(read_entries(Storage(), f"{tmp_path}/queue.json")) == 2


def test_evaluation_during_which_the_service_dies_three_times_fails(tmp_path):
    queue_in(tmp_path).update(commits_of(10, 20))
    for _ in range(3):
        assert queue_in(tmp_path).take("every")[0].step == 10  # as if the service died during the evaluation
    manager = EvaluationManager(
        queue_in(tmp_path), lambda: commits_of(10, 20), "every", lambda entry, report: {"val/PQ": 1.0}
    )
    wait_until(lambda: manager.status().idle)
    manager.close()
    first, second = manager.status().entries
    assert (first.status, second.status) == ("failed", "published")
    assert first.detail == "the evaluation service died 3 times while evaluating it"


def test_policy_latest_drops_older_waiting_entries(tmp_path):
    queue = queue_in(tmp_path)
    queue.update(commits_of(10, 20, 30))
    entry, dropped = queue.take("latest")
    assert entry is not None
    assert entry.step == 30
    assert [e.step for e in dropped] == [10, 20]
    queue.publish(entry, {"val/PQ": 50.0})
    assert statuses(read_entries(Storage(), f"{tmp_path}/queue.json")) == {
        10: "dropped",
        20: "dropped",
        30: "published",
    }


def test_damaged_queue_raises_an_error_with_its_path(tmp_path):
    (tmp_path / "queue.json").write_text("[1, 2")
    with pytest.raises(EvaluationError, match=r"queue\.json is not a valid evaluation queue"):
        queue_in(tmp_path)


def test_every_checkpoint_is_evaluated_once_and_a_failure_affects_only_its_entry(tmp_path):
    evaluated_steps: list[int] = []
    released: list[int] = []

    def evaluate(entry: Entry, report) -> dict[str, float]:
        evaluated_steps.append(entry.step)
        report(EvaluationProgress(entry.step, entry.key, "val", 1, 2))
        if entry.step == 20:
            raise EvaluationError("evaluation batch 7 failed 3 times")
        return {"val/PQ": float(entry.step)}

    steps = [10, 20]
    manager = EvaluationManager(
        queue_in(tmp_path),
        lambda: commits_of(*steps),
        "every",
        evaluate,
        lambda settled: released.extend(entry.step for entry in settled),
        poll_interval_s=0.01,
    )
    wait_until(lambda: len(released) == 2)
    steps.append(30)
    wait_until(lambda: len(released) == 3)
    manager.close()
    assert evaluated_steps == released == [10, 20, 30]
    assert manager.status().entries[2].metrics == {"val/PQ": 30.0}
    assert statuses(manager.status().entries) == {10: "published", 20: "failed", 30: "published"}
    assert manager.status().entries[1].detail == "EvaluationError: evaluation batch 7 failed 3 times"
    assert manager.status().current is None


def test_status_does_not_wait_for_the_running_evaluation(tmp_path):
    gate = threading.Event()
    manager = EvaluationManager(
        queue_in(tmp_path),
        lambda: commits_of(1, 2, 3),
        "every",
        lambda entry, report: {"ok": float(gate.wait(PATIENCE_S))},
    )
    wait_until(lambda: len(manager.status().entries) == 3)
    assert not manager.status().idle  # the evaluation waits for the gate
    gate.set()
    wait_until(lambda: manager.status().idle)
    manager.close()


def test_new_manager_continues_the_stored_queue(tmp_path):
    queue = queue_in(tmp_path)
    queue.update(commits_of(10, 20))
    entry, _ = queue.take("every")
    queue.publish(entry, {"val/PQ": 50.0})
    queue.take("every")  # as if the process died during the evaluation of step 20
    evaluated_steps: list[int] = []
    released: list[int] = []

    def evaluate(entry: Entry, report) -> dict[str, float]:
        evaluated_steps.append(entry.step)
        return {}

    manager = EvaluationManager(
        queue_in(tmp_path),
        lambda: commits_of(10, 20),
        "every",
        evaluate,
        lambda settled: released.extend(entry.step for entry in settled),
    )
    wait_until(lambda: len(released) == 2)
    manager.close()
    assert evaluated_steps == [20]
    assert released == [10, 20]  # the dead manager may not have released step 10


class RefusingStorage(Storage):
    """Storage whose next `refusals` writes fail."""

    refusals = 0

    def put(self, url, data, if_absent=False):
        if self.refusals:
            self.refusals -= 1
            raise StorageError(f"{url}: the store is away")
        super().put(url, data, if_absent)


def test_failed_write_leaves_the_queue_unchanged(tmp_path):
    storage = RefusingStorage()
    queue = EvaluationQueue(storage, f"{tmp_path}/queue.json")
    storage.refusals = 1
    with pytest.raises(StorageError):
        queue.update(commits_of(10))
    assert queue.entries() == ()
    queue.update(commits_of(10))
    storage.refusals = 1
    with pytest.raises(StorageError):
        queue.take("every")
    assert statuses(queue.entries()) == {10: "waiting"}


@pytest.mark.parametrize("when", ["taking", "publishing"])
def test_storage_error_delays_evaluations_without_losing_any(tmp_path, monkeypatch, when):
    monkeypatch.setattr("m2f.cluster.evaluation.manager.RETRY_S", 0.01)
    storage, evaluated = RefusingStorage(), []
    queue = EvaluationQueue(storage, f"{tmp_path}/queue.json")
    queue.update(commits_of(10))

    def evaluate(entry: Entry, report) -> dict[str, float]:
        evaluated.append(entry.step)
        storage.refusals = int(when == "publishing" and len(evaluated) == 1)
        return {"val/PQ": 50.0}

    storage.refusals = int(when == "taking")
    manager = EvaluationManager(queue, lambda: commits_of(10), "every", evaluate)
    wait_until(lambda: statuses(manager.status().entries) == {10: "published"})
    manager.close()
    assert evaluated == [10] * (2 if when == "publishing" else 1)
    assert statuses(read_entries(Storage(), f"{tmp_path}/queue.json")) == {10: "published"}


def test_checkpoint_whose_release_fails_is_released_later(tmp_path, monkeypatch):
    monkeypatch.setattr("m2f.cluster.evaluation.manager.RETRY_S", 0.01)
    outages, released = [OutageError("s3://b/k: no answer")], []

    def release_or_fail(settled):
        if outages:
            raise outages.pop()
        released.extend(entry.step for entry in settled)

    manager = EvaluationManager(
        queue_in(tmp_path), lambda: commits_of(10), "every", lambda entry, report: {}, release_or_fail
    )
    wait_until(lambda: released)
    manager.close()
    assert released == [10]


def test_error_that_ends_the_evaluation_thread_is_in_the_status(tmp_path):
    def find():
        raise CheckpointError("lease/000002 cannot be read")

    manager = EvaluationManager(queue_in(tmp_path), find, "every", lambda entry, report: {})
    wait_until(lambda: manager.status().failure_reason)
    assert manager.status().failure_reason == "CheckpointError: lease/000002 cannot be read"
    manager.close()


def make_checkpoint(storage: Storage, run_folder: str, step: int) -> str:
    """Write a checkpoint that waits for its evaluation, and return its URL."""
    url = checkpoint_url(run_folder, step)
    storage.put(join(url, MANIFEST), b"")
    pin(storage, url, EVALUATION_PIN)
    return url


def test_best_checkpoint_stays_pinned(tmp_path):
    storage, run_folder, entries = Storage(), str(tmp_path), []
    for step, value in ((4, 20.0), (8, 30.0), (12, 10.0), (16, 40.0)):
        url = make_checkpoint(storage, run_folder, step)
        entries.append(Entry(step, url, 0, "published", metrics={"val/PQ": value}))
        release(storage, run_folder, entries[-1:], entries, "val/PQ")
        best = max(entries, key=lambda entry: entry.metrics["val/PQ"])
        assert {e.step: pins(storage, e.checkpoint) for e in entries if pins(storage, e.checkpoint)} == {
            best.step: (BEST_PIN,)
        }
    release(storage, run_folder, entries, entries, "val/PQ")  # a restarted manager releases all published entries
    assert pins(storage, entries[3].checkpoint) == (BEST_PIN,)


def test_only_the_earlier_best_checkpoint_is_unpinned(tmp_path):
    storage, run_folder, entries = Storage(), str(tmp_path), []
    for step in range(1, 21):
        url = make_checkpoint(storage, run_folder, step)
        entries.append(Entry(step, url, 0, "published", metrics={"val/PQ": float(step)}))
        before = storage.counters.requests
        release(storage, run_folder, entries[-1:], entries, "val/PQ")
        assert storage.counters.requests - before <= 6  # the same for any number of existing checkpoints
    assert [e.step for e in entries if pins(storage, e.checkpoint)] == [20]


def test_best_of_the_existing_checkpoints_is_pinned_if_a_better_one_was_deleted(tmp_path):
    storage, run_folder = Storage(), str(tmp_path)
    values = {100: 50.0, 400: 48.0, 500: 46.0}  # retention has deleted step 100 before `best_metric` was set
    entries = [
        Entry(step, checkpoint_url(run_folder, step), 0, "published", metrics={"val/PQ": value})
        for step, value in values.items()
    ]
    for step in (400, 500):
        make_checkpoint(storage, run_folder, step)
    before = storage.counters.requests
    release(storage, run_folder, entries[-1:], entries, "val/PQ")
    assert storage.counters.requests - before <= 5  # the same for any number of deleted checkpoints
    assert [pins(storage, entry.checkpoint) for entry in entries] == [(), (BEST_PIN, EVALUATION_PIN), ()]


def test_copied_run_folder_changes_no_pins_of_the_original(tmp_path):
    storage, original, copied = Storage(), str(tmp_path / "original"), str(tmp_path / "copied")

    def evaluate(run_folder: str, step: int, value: float) -> None:
        queue = EvaluationQueue(storage, f"{run_folder}/evaluations/queue.json")
        release(storage, run_folder, queue.entries(), queue.entries(), "val/PQ")  # as at every start
        url = make_checkpoint(storage, run_folder, step)
        queue.update(CommitList((Commit(f"{step:08d}-0-a", CommittedCheckpoint(step, url)),)))
        entry, _ = queue.take("every")
        queue.publish(entry, {"val/PQ": value})
        release(storage, run_folder, queue.entries()[-1:], queue.entries(), "val/PQ")

    evaluate(original, 10, 50.0)
    shutil.copytree(original, copied)
    evaluate(copied, 20, 60.0)
    assert pins(storage, checkpoint_url(original, 10)) == (BEST_PIN,)
    assert pins(storage, checkpoint_url(copied, 10)) == ()
    assert pins(storage, checkpoint_url(copied, 20)) == (BEST_PIN,)


def test_evaluation_interrupted_by_an_outage_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("m2f.cluster.evaluation.manager.RETRY_S", 0.01)
    outages = [OutageError("s3://b/k: no answer")] * 9

    def evaluate(entry, report):
        if outages:
            raise outages.pop()
        return {"val/PQ": 1.0}

    manager = EvaluationManager(queue_in(tmp_path), lambda: commits_of(10), "every", evaluate, poll_interval_s=0.01)
    wait_until(lambda: manager.status().idle and manager.status().entries)
    manager.close()
    assert statuses(manager.status().entries) == {10: "published"}
