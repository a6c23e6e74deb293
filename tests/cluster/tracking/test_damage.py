"""Tests of tracking with damaged records, journals and databases, and with full or read-only disks."""

import dataclasses
import json
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.journal import Journal
from m2f.cluster.tracking.reporter import TrackingReporter
from m2f.cluster.tracking.tracked_run import RunLease
from m2f.cluster.tracking.tracking import Tracking, TrackingError, create_run, find_run
from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.storage.storage import Storage
from tests.mounts import fill_disk, read_only, small_disk
from tests.waiting import PATIENCE_S, wait_until

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""
KILLED_DRIVER = Path(__file__).with_name("killed_making_database.py")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return dataclasses.replace(parse_recipe(RECIPE), output=str(tmp_path / "runs"))


@pytest.fixture
def run(config, migrated_database):
    Path(config.output).mkdir()
    Path(config.output, "mlflow.db").write_bytes(migrated_database)
    return create_run(config)


@contextmanager
def full_disk(folder):
    with small_disk(folder, "16k"):
        fill_disk(folder)
        yield


def history(run, key="train/loss"):
    return [(m.step, m.value) for m in MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, key)]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"uri": "sqlite:///x", "run_id": 7, "parameters": {}}', None])
def test_damaged_tracking_record_is_rebuilt_from_the_store(config, run, content, caplog):
    record = Path(config.run_folder, "tracking.json")
    record.write_text(record.read_text()[:200] if content is None else content)
    assert find_run(config) == run
    assert create_run(config) == run
    assert "tracking.json cannot be read" in caplog.text
    assert f"found run {run.run_id} there" in caplog.text
    assert json.loads(record.read_text())["run_id"] == run.run_id
    caplog.clear()
    assert create_run(config) == run
    assert not caplog.text


def test_an_outage_while_reading_the_tracking_record_is_raised(config, run, monkeypatch):
    def fail(_, url):
        raise OutageError(f"{url}: no answer")

    monkeypatch.setattr(Storage, "get", fail)
    with pytest.raises(OutageError, match=r"tracking\.json: no answer"):
        find_run(config)


@pytest.mark.parametrize("folder", ["it's", 'it\'s "ours"'])
def test_damaged_record_in_a_shared_store_finds_the_run_of_its_folder(
    config, migrated_database, tmp_path, caplog, folder
):
    (tmp_path / "shared.db").write_bytes(migrated_database)
    uri = f"sqlite:///{tmp_path}/shared.db"
    own, other, without_run = (
        dataclasses.replace(
            config, output=f"{tmp_path}/{folder}", name=name, tracking=dataclasses.replace(config.tracking, uri=uri)
        )
        for name in ("ours", "other", "none")
    )
    run, *_ = create_run(own), create_run(other)
    for each in (own, without_run):
        Path(each.run_folder).mkdir(exist_ok=True, parents=True)
        Path(each.run_folder, "tracking.json").write_text('{"uri"')
    assert create_run(own).run_id == run.run_id
    assert find_run(without_run) is None
    assert create_run(without_run).run_id != run.run_id
    assert "found no run of this folder; training creates one" in caplog.text


@pytest.mark.parametrize(
    "line", ['{"strange": 1}', '{"status": 7}', '{"step": "x", "time_ms": 1, "metrics": {"a": 1}}', "[1]", '{"ta']
)
def test_unknown_journal_entry_does_not_block_the_following_ones(run, line, caplog):
    path = run.journal("rank0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n")
    tracking = Tracking(run, "rank0", interval_s=0.05)
    TrackingReporter(tracking).track(1, {"loss": 1.0})
    assert tracking.finish("FINISHED", PATIENCE_S)
    assert history(run) == [(1, 1.0)]
    refused = path.with_name("rank0.jsonl.refused")
    kept = [refused] if line.startswith("{") and line.endswith("}") else []
    assert list(path.parent.iterdir()) == kept
    assert [json.loads(file.read_text()) for file in kept] == [json.loads(line) for _ in kept]


def test_metrics_rejected_by_a_full_disk_can_be_reported_again(run, config, tmp_path, caplog):
    with small_disk(tmp_path / "small", "64k") as disk:
        run_on_disk = dataclasses.replace(run, spool=str(disk))
        tracking = Tracking(run_on_disk, "driver", interval_s=3600.0)
        reporter = TrackingReporter(tracking)
        assert reporter.track(1, {"loss": 1.0})
        filler = fill_disk(disk)
        accepted = [reporter.track(step, {"loss": float(step)}) for step in range(2, 200)]
        assert not all(accepted), "the disk is larger than it should be"
        assert "cannot write" in caplog.text
        filler.unlink()
        assert all(reporter.track(step, {"loss": float(step)}) for step in range(2, 201))
        assert tracking.close(PATIENCE_S)
    assert sorted(history(run)) == [(step, float(step)) for step in range(1, 201)]


def test_full_disk_at_the_end_keeps_journals_for_the_next_start(run, config, tmp_path, caplog):
    with small_disk(tmp_path / "small", "64k") as disk:
        leased_run = dataclasses.replace(run, spool=str(disk), lease=RunLease(config.run_folder, 1, StorageConfig()))
        evaluation = Journal(leased_run.journal("evaluation"))
        evaluation.append({"metrics": {"val/PQ": 50.0}, "step": 4, "time_ms": 1})
        tracking = Tracking(leased_run, "driver", interval_s=0.05)
        filler = fill_disk(disk)
        assert not tracking.finish("FINISHED", 1.0)
        assert "free some space, and start the run again" in caplog.text
        assert evaluation.path.exists()
        filler.unlink()
        again = dataclasses.replace(leased_run, lease=RunLease(config.run_folder, 2, StorageConfig()))
        assert Tracking(again, "driver", interval_s=0.05).finish("FINISHED", PATIENCE_S)
        assert not evaluation.path.exists()


def test_failed_append_on_a_full_disk_leaves_no_partial_line(tmp_path):
    with small_disk(tmp_path / "small", "64k") as disk:
        journal = Journal(disk / "a.jsonl")
        filler = fill_disk(disk, num_free_bytes=4096)
        with pytest.raises(OSError, match="No space"):
            journal.append({"long": "x" * 9000})  # only a part fits on the disk
        journal.append({"short": 1})
        filler.unlink()
        journal.append({"short": 2})
        assert (disk / "a.jsonl").read_text() == '{"short": 1}\n{"short": 2}\n'


@pytest.mark.parametrize("disk", [full_disk, read_only])
def test_unwritable_journal_folder_raises_one_message(config, run, disk):
    Path(run.spool).mkdir(exist_ok=True)
    with disk(Path(run.spool)), pytest.raises(TrackingError, match=r"cannot write metrics for MLflow to .*tracking \("):
        create_run(config)


def test_full_disk_at_the_first_start_raises_one_message_without_sql(config, tmp_path, capfd):
    with small_disk(tmp_path / "runs", "200k"):
        with pytest.raises(TrackingError, match=r"database or disk is full\)?\. Free some space") as caught:
            create_run(config)
        assert [path.name for path in Path(config.output).iterdir()] == ["mlflow.db.lock"]  # no partial database
    assert "\n" not in str(caught.value)
    assert "UPDATE" not in str(caught.value) + capfd.readouterr().err


def test_start_killed_during_table_creation_leaves_no_partial_database(config):
    process = subprocess.Popen([sys.executable, KILLED_DRIVER, config.output], stdout=subprocess.PIPE, text=True)
    folder = Path(config.output)
    wait_until(lambda: any(path.stat().st_size for path in folder.glob(".partial-*-mlflow.db")), "a partial database")
    process.kill()
    process.wait()
    assert not (folder / "mlflow.db").exists()
    assert list(folder.glob(".partial-*"))
    run = create_run(config)
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).info.run_name == "tracked"
    assert not list(folder.glob(".partial-*"))


def test_incomplete_database_of_an_earlier_version_is_not_used(config, migrated_database):
    folder = Path(config.run_folder)
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_bytes(migrated_database)
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")  # later migrations are missing
    Path(config.output, "mlflow.db").write_bytes(migrated_database)
    run = create_run(config)
    assert run.uri == f"sqlite:///{config.output}/mlflow.db"
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).info.run_name == "tracked"


@pytest.mark.parametrize("place", ["", "tracked"])
def test_damaged_database_raises_one_message_and_is_kept(config, place):
    folder = Path(config.output, place)
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_bytes(b"half a database" * 100)
    with pytest.raises(TrackingError, match=r"not a database.* move it away"):
        create_run(config)
    assert (folder / "mlflow.db").read_bytes() == b"half a database" * 100
