"""The list of commits and their metrics: recording, repair, withdrawal, and late commits."""

import hashlib
import json
from pathlib import Path

import pytest

from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.commits import (
    list_commits,
    read_commits,
    read_metrics,
    record_commit,
    repair_commits,
    withdraw_commit,
    write_metrics,
)
from m2f.trainer.checkpoint.folder import EVALUATION_PIN, MANIFEST, CheckpointManifest, checkpoint_url, pins
from m2f.trainer.checkpoint.lease import hold_lease
from m2f.trainer.reporting import CommittedCheckpoint


@pytest.fixture(params=["disk", "s3"])
def run_folder(request, tmp_path):
    return str(tmp_path / "run") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def save(storage, run_folder, step, lease, content=1):
    """Write a checkpoint's manifest without adding it to the list of commits."""
    url = checkpoint_url(run_folder, step, lease)
    storage.put(join(url, MANIFEST), CheckpointManifest(step, content, 1, {}).to_json())
    return CommittedCheckpoint(step, url)


def commit(storage, run_folder, step, lease, content=1):
    checkpoint = save(storage, run_folder, step, lease, content)
    record_commit(storage, checkpoint, storage.get(join(checkpoint.url, MANIFEST)))
    return checkpoint


def steps(storage, run_folder):
    return [found.checkpoint.step for found in list_commits(storage, run_folder)]


def test_step_committed_again_after_a_rollback_is_a_new_commit(run_folder):
    storage = Storage()
    commit(storage, run_folder, 10, 1)
    first = commit(storage, run_folder, 20, 1)
    before = list_commits(storage, run_folder)
    withdraw_commit(storage, first.url)
    assert steps(storage, run_folder) == [10]
    commit(storage, run_folder, 20, 1, content=2)
    after = list_commits(storage, run_folder)
    assert [found.checkpoint.step for found in after] == [10, 20]
    assert after[0] == before[0]
    assert after[1].name != before[1].name
    assert after[1].checkpoint == before[1].checkpoint


def test_checkpoint_can_be_committed_again_after_its_commit_was_withdrawn(run_folder):
    storage = Storage()
    checkpoint = commit(storage, run_folder, 10, 1)
    withdraw_commit(storage, checkpoint.url)
    withdraw_commit(storage, checkpoint_url(run_folder, 30, 1))  # no effect: it has no manifest
    assert steps(storage, run_folder) == []
    commit(storage, run_folder, 10, 1)
    assert steps(storage, run_folder) == [10]


def test_a_commit_without_its_entry_is_listed_and_pinned_by_the_next_start(run_folder):
    storage = Storage()
    commit(storage, run_folder, 10, 1)
    missing = save(storage, run_folder, 20, 1)
    assert steps(storage, run_folder) == [10]
    repair_commits(storage, run_folder, evaluates=True)
    assert steps(storage, run_folder) == [10, 20]
    assert pins(storage, missing.url) == (EVALUATION_PIN,)
    repair_commits(storage, run_folder, evaluates=False)
    assert pins(storage, missing.url) == ()


@pytest.mark.parametrize("kept", [(20, 30), (20,), ()])
def test_commits_after_the_newest_checkpoint_are_withdrawn_at_the_next_start(run_folder, kept):
    storage = Storage()
    with hold_lease(storage, run_folder, lambda text: None) as first:
        for step in (10, 20, 30):
            commit(storage, run_folder, step, first.number)
    names = {found.checkpoint.step: found.name for found in list_commits(storage, run_folder)}
    for step in names.keys() - kept:  # retention has deleted step 10, and the user deletes the newest ones
        storage.delete_prefix(checkpoint_url(run_folder, step, first.number))
    with hold_lease(storage, run_folder, lambda text: None) as second:
        repair_commits(storage, run_folder, evaluates=True)
        undone = {step for step in names if step > max(kept, default=0)}
        assert read_commits(storage, run_folder).withdrawn == {names[step] for step in undone}
        assert steps(storage, run_folder) == list(kept)
        commit(storage, run_folder, 30, second.number)
        assert steps(storage, run_folder) == sorted([*kept, 30])


def test_late_commits_of_a_driver_that_lost_the_lease_are_ignored(run_folder):
    storage = Storage()
    with hold_lease(storage, run_folder, lambda text: None) as first:
        commit(storage, run_folder, 10, first.number)
        write_metrics(storage, run_folder, 10, first.number, {10: {"loss": 1.0}})
    with hold_lease(storage, run_folder, lambda text: None) as second:
        commit(storage, run_folder, 20, first.number)
        write_metrics(storage, run_folder, 20, first.number, {20: {"loss": 2.0}})
        save(storage, run_folder, 30, first.number)
        repair_commits(storage, run_folder, evaluates=True)
        assert steps(storage, run_folder) == [10]
        commit(storage, run_folder, 15, second.number)
        write_metrics(storage, run_folder, 15, second.number, {15: {"loss": 1.5}})
        assert steps(storage, run_folder) == [10, 15]
        found = [points for _, points in read_metrics(storage, run_folder)]
    assert found == [{10: {"loss": 1.0}}, {15: {"loss": 1.5}}]


def test_metrics_that_several_leases_wrote_are_left_out_after_a_user_went_back_behind_them(run_folder):
    storage = Storage()
    for new_steps in ((10, 20), (30,), (20,)):
        with hold_lease(storage, run_folder, lambda text: None) as lease:
            for step in new_steps:
                commit(storage, run_folder, step, lease.number)
                write_metrics(storage, run_folder, step, lease.number, {step: {"loss": 1.0}})
        if lease.number == 2:
            for undone in ((20, 1), (30, 2)):
                storage.delete_prefix(checkpoint_url(run_folder, *undone))
    found = [url.rpartition("/")[2] for url, _ in read_metrics(storage, run_folder)]
    assert found == ["00000010-1.json", "00000020-3.json"]


def test_metrics_are_stored_exactly_and_read_once(run_folder):
    storage = Storage()
    points = {3: {"loss": 0.1 + 0.2, "lr": 1e-300}, 4: {"loss": float("inf")}}
    write_metrics(storage, run_folder, 4, 1, points)
    ((url, found),) = read_metrics(storage, run_folder)
    assert found == points
    assert list(read_metrics(storage, run_folder, {url})) == []


def test_metrics_within_a_checkpoint_of_version_0_1_are_kept(tmp_path):
    storage, run_folder = Storage(), str(tmp_path)
    folder = Path(checkpoint_url(run_folder, 4, 0))
    folder.mkdir(parents=True)
    data = json.dumps({"3": {"loss": 0.5}}).encode()
    (folder / "metrics.json").write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"version": 1, "step": 4, "world_size": 1, "zero_stage": 1, "files": {"metrics.json": entry}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    repair_commits(storage, run_folder, evaluates=False)
    assert steps(storage, run_folder) == [4]
    assert [points for _, points in read_metrics(storage, run_folder)] == [{3: {"loss": 0.5}}]
