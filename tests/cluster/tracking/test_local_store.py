"""Tests of the MLflow store shared by the runs of an output folder: concurrency, schema versions, moved folders."""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_memory

from m2f.cluster.compare.records import read_runs
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.database import database_lock
from m2f.cluster.tracking.local_store import ARTIFACTS, find_stored
from m2f.cluster.tracking.record import record_evaluations
from m2f.cluster.tracking.store import ui_command
from m2f.cluster.tracking.tracking import Tracking, TrackingError, create_run, find_run
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.commits import write_metrics
from tests.mounts import read_only
from tests.waiting import PATIENCE_S

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""
MIGRATIONS = Path(sys.modules["mlflow"].__file__).parent / "store" / "db_migrations"
KILLED_DRIVER = Path(__file__).with_name("killed_making_database.py")


@pytest.fixture(autouse=True)
def without_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def output(tmp_path, migrated_database):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(migrated_database)
    return folder


@pytest.fixture(scope="session")
def old_database(tmp_path_factory, migrated_database):
    """Return a database of an older schema with one run, as an older MLflow would write it."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "mlflow.db").write_bytes(migrated_database)
    create_run(config_in(folder, "before"))
    alembic = Config(str(MIGRATIONS / "alembic.ini"))
    alembic.set_main_option("script_location", str(MIGRATIONS))
    alembic.set_main_option("sqlalchemy.url", f"sqlite:///{folder}/mlflow.db")
    command.downgrade(alembic, "-3")
    return (folder / "mlflow.db").read_bytes()


def config_in(output, name="tracked"):
    return dataclasses.replace(parse_recipe(RECIPE), output=str(output), name=name)


def client_of(output):
    return MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")


def write_point(run, step, value=1.0, artifact=None):
    tracking = Tracking(run, "driver", interval_s=0.05)
    tracking.log_metrics(step, {"train/loss/total": value})
    if artifact is not None:
        tracking.log_artifact(artifact, "evaluations")
    assert tracking.finish("FINISHED", PATIENCE_S)


def move(source, target):
    shutil.move(source, target)
    mlflow_memory._artifact_repos_cache.clear()  # another process would start with an empty cache


def stored_files(client, run):
    return {file.path for file in client.list_artifacts(run.run_id)}


def write_recipe(config):
    Path(config.run_folder, "recipe.yaml").write_text(RECIPE.replace("tracked", config.name))


def test_all_runs_of_an_output_share_one_store(output, tmp_path):
    (tmp_path / "panels.png").write_bytes(b"png")
    runs = [create_run(config_in(output, name)) for name in ("a", "b")]
    for number, run in enumerate(runs):
        write_point(run, 1, float(number), tmp_path / "panels.png")
    client = client_of(output)
    experiment = client.get_experiment_by_name("m2f")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"a", "b"}
    for run in runs:
        assert Path(output, ARTIFACTS, run.run_id, "artifacts/evaluations/panels.png").is_file()
        assert run.uri == f"sqlite:///{output}/mlflow.db"
    assert not list(output.glob("*/mlflow.db"))


def test_run_with_its_own_store_keeps_it_and_can_be_compared_with_new_runs(output, migrated_database):
    old, new = config_in(output, "old"), config_in(output, "new")
    Path(old.run_folder).mkdir()
    Path(old.run_folder, "mlflow.db").write_bytes(migrated_database)
    client = client_of(old.run_folder)
    experiment = client.create_experiment("m2f", artifact_location=Path(old.run_folder, "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="old", tags={"m2f.run_folder": old.run_folder}).info.run_id
    record = {"uri": f"sqlite:///{old.run_folder}/mlflow.db", "run_id": run_id, "parameters": {}}
    Path(old.run_folder, "tracking.json").write_text(json.dumps(record))
    resumed = create_run(old)
    assert (resumed.uri, resumed.run_id) == (record["uri"], run_id)
    for config in (old, new):
        write_point(create_run(config), 3, 2.0)
        write_recipe(config)
    records = read_runs([old.run_folder, new.run_folder], tracking=None, experiment=None, query=None, step=None)
    assert [record.curves["train/loss/total"] for record in records] == [((3, 2.0),)] * 2
    assert [record.notes for record in records] == [()] * 2


def test_moved_output_continues_in_its_new_location(output, tmp_path):
    (tmp_path / "panels.png").write_bytes(b"png")
    for name in ("a", "b"):
        write_point(create_run(config_in(output, name)), 1, 1.0, tmp_path / "panels.png")
        write_recipe(config_in(output, name))
    moved = tmp_path / "else where" / "runs"
    move(output, moved)
    (named,) = read_runs(["a"], tracking=f"sqlite:///{moved}/mlflow.db", experiment="m2f", query=None, step=None)
    assert (named.notes, named.recipe["name"]) == ((), "a")
    (folder,) = read_runs([str(moved / "b")], tracking=None, experiment=None, query=None, step=None)
    assert folder.curves["train/loss/total"] == ((1, 1.0),)
    assert not output.exists()
    config = config_in(moved, "a")
    run = create_run(config)
    (tmp_path / "more.png").write_bytes(b"png")
    write_point(run, 2, 2.0, tmp_path / "more.png")
    client = client_of(moved)
    assert {file.path for file in client.list_artifacts(run.run_id, "evaluations")} == {
        "evaluations/more.png",
        "evaluations/panels.png",
    }
    stored = client.get_run(run.run_id)
    assert stored.data.tags["m2f.run_folder"] == config.run_folder
    assert len(client.search_runs([stored.info.experiment_id])) == 2
    other = find_run(config_in(moved, "b"))  # as `m2f eval` does
    assert Path(moved, ARTIFACTS, other.run_id).is_dir()
    assert stored_files(client, other) == {"evaluations", "recipe.yaml"}
    write_point(create_run(config_in(moved, "new")), 1)
    assert not output.exists()


def test_run_folder_moved_to_another_output_is_created_again_in_its_store(output, tmp_path, migrated_database, caplog):
    config = config_in(output)
    first = create_run(config)
    write_point(first, 1)
    write_metrics(Storage(), config.run_folder, 2, 0, {1: {"loss/total": 1.0}, 2: {"loss/total": 0.5}})
    write_recipe(config)
    new_output = tmp_path / "there"
    new_output.mkdir()
    (new_output / "mlflow.db").write_bytes(migrated_database)
    move(config.run_folder, new_output)
    moved = config_in(new_output)
    (old,) = read_runs([moved.run_folder], tracking=None, experiment=None, query=None, step=None)
    assert old.curves["train/loss/total"] == ((1, 1.0),)  # from the store of the old output folder
    run = create_run(moved)
    assert run.recreated
    assert run.run_id != first.run_id
    assert f"creating it again in sqlite:///{new_output}/mlflow.db" in caplog.text
    caplog.clear()
    assert create_run(moved) == run  # as after a driver that died before it sent the stored evaluations
    record_evaluations(Storage(), moved.run_folder)
    assert create_run(moved) == dataclasses.replace(run, recreated=False)
    assert not caplog.text
    assert not Path(config.run_folder).exists()
    shutil.rmtree(output)
    shutil.rmtree(new_output / ARTIFACTS)
    (new_output / "mlflow.db").unlink()
    (restored,) = read_runs([moved.run_folder], tracking=None, experiment=None, query=None, step=None)
    assert restored.curves["train/loss/total"] == ((1, 1.0), (2, 0.5))  # from the metrics files of the run folder
    assert "read from the run folder: the MLflow database" in restored.notes[0]


def test_copied_run_folder_gets_a_new_mlflow_run(output):
    config, renamed, copied = (config_in(output, name) for name in ("tracked", "renamed", "copied"))
    first = create_run(config)
    shutil.copytree(config.run_folder, copied.run_folder)
    assert create_run(copied).run_id != first.run_id
    os.rename(config.run_folder, renamed.run_folder)
    run = create_run(renamed)
    assert run.run_id == first.run_id
    write_point(run, 1)
    assert client_of(output).get_run(run.run_id).data.tags["m2f.run_folder"] == renamed.run_folder


def test_empty_database_holds_no_run(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert find_stored(tmp_path / "mlflow.db", "a" * 32) is None


def test_deleted_run_is_created_again(output, caplog):
    config = config_in(output)
    first = create_run(config)
    client_of(output).delete_run(first.run_id)
    again = create_run(config)
    assert again.recreated
    assert again.run_id != first.run_id
    assert f"found no MLflow run {first.run_id}" in caplog.text
    experiment = client_of(output).get_run(again.run_id).info.experiment_id
    client_of(output).delete_experiment(experiment)
    with pytest.raises(TrackingError, match=r"must be in the 'active' state.*Restore it in MLflow"):
        create_run(config)


def test_moved_run_folder_with_its_own_store_continues_in_its_new_location(output, tmp_path, migrated_database):
    config = config_in(output)
    folder = Path(config.run_folder)
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(migrated_database)
    client = client_of(folder)
    experiment = client.create_experiment("m2f", artifact_location=(folder / "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="tracked").info.run_id
    client.log_text(run_id, "old", "old.txt")
    record = {"uri": f"sqlite:///{folder}/mlflow.db", "run_id": run_id, "parameters": {}}
    (folder / "tracking.json").write_text(json.dumps(record))
    moved = config_in(tmp_path / "there")
    Path(moved.output).mkdir()
    move(folder, moved.run_folder)
    run = create_run(moved)
    assert (run.run_id, run.uri) == (run_id, f"sqlite:///{moved.run_folder}/mlflow.db")
    (tmp_path / "panels.png").write_bytes(b"png")
    write_point(run, 1, 1.0, tmp_path / "panels.png")
    assert Path(moved.run_folder, "artifacts", run_id, "artifacts/evaluations/panels.png").is_file()
    assert stored_files(client_of(moved.run_folder), run) == {"evaluations", "old.txt"}
    assert json.loads(Path(moved.run_folder, "tracking.json").read_text())["uri"] == run.uri
    assert not folder.exists()


def test_artifact_location_set_by_the_user_is_kept(output, tmp_path):
    experiment = client_of(output).create_experiment("m2f", artifact_location=(tmp_path / "x" / "artifacts").as_uri())
    create_run(config_in(output))
    assert client_of(output).get_experiment(experiment).artifact_location == (tmp_path / "x" / "artifacts").as_uri()


def test_older_schema_is_upgraded_and_the_old_file_is_kept(tmp_path, old_database, caplog):
    (tmp_path / "mlflow.db").write_bytes(old_database)
    run = create_run(config_in(tmp_path, "after"))
    client = client_of(tmp_path)
    names = {found.info.run_name for found in client.search_runs([client.get_run(run.run_id).info.experiment_id])}
    assert names == {"before", "after"}
    (kept,) = tmp_path.glob("mlflow.db.before-*")
    with closing(sqlite3.connect(kept)) as database:
        assert database.execute("SELECT COUNT(*) FROM runs").fetchone() == (1,)
    assert caplog.text.count("upgrading") == 1
    create_run(config_in(tmp_path, "after"))
    assert caplog.text.count("upgrading") == 1
    assert not list(tmp_path.glob(".partial-*"))


def test_comparing_runs_does_not_change_an_older_store(tmp_path, old_database):
    (tmp_path / "mlflow.db").write_bytes(old_database)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(Exception, match=f"`mlflow db upgrade {uri}`"):
        read_runs(["before"], tracking=uri, experiment=None, query=None, step=None)
    assert (tmp_path / "mlflow.db").read_bytes() == old_database


def test_newer_schema_raises_one_message(output):
    with closing(sqlite3.connect(output / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(TrackingError, match=r"its tables are from a newer MLflow \(schema ffffffffffff") as caught:
        create_run(config_in(output))
    assert "\n" not in str(caught.value)


def start(output, name, *words):
    return subprocess.Popen(
        [sys.executable, KILLED_DRIVER, str(output), name, *words], stdout=subprocess.PIPE, text=True
    )


def names_in(output):
    client = client_of(output)
    experiment = client.get_experiment_by_name("m2f")
    return sorted(run.info.run_name for run in client.search_runs([experiment.experiment_id]))


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_concurrent_drivers_create_or_upgrade_one_store(tmp_path, old, old_database):
    if old:
        (tmp_path / "mlflow.db").write_bytes(old_database)
    processes = [start(tmp_path, name) for name in ("a", "b")]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    assert names_in(tmp_path) == sorted(["a", "b", *(["before"] if old else [])])
    assert len(list(tmp_path.glob("mlflow.db.before-*"))) == old
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.slow
def test_driver_killed_during_upgrade_leaves_the_store_unchanged(tmp_path, old_database):
    (tmp_path / "mlflow.db").write_bytes(old_database)
    assert start(tmp_path, "killed", "dies").wait(PATIENCE_S) == -signal.SIGKILL
    assert list(tmp_path.glob(".partial-*"))
    assert (tmp_path / "mlflow.db").read_bytes() == old_database
    create_run(config_in(tmp_path, "next"))
    assert names_in(tmp_path) == ["before", "next"]
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.slow
def test_concurrent_drivers_lose_no_metrics(output):
    words = [sys.executable, str(Path(__file__).with_name("writes_points.py")), str(output)]
    processes = [subprocess.Popen([*words, name, "200"]) for name in ("a", "b")]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    client = client_of(output)
    for name in ("a", "b"):
        run_id = json.loads(Path(output, name, "tracking.json").read_text())["run_id"]
        steps = [point.step for point in client.get_metric_history(run_id, "train/loss/total")]
        assert sorted(steps) == list(range(200))


def test_database_lock_times_out_with_a_message_and_is_released(tmp_path):
    path = tmp_path / "mlflow.db"
    message = r"has held .*mlflow\.db\.lock for longer than storage\.patience_s \(0\.3 s\)"
    with database_lock(path, 1.0), pytest.raises(TrackingError, match=message), database_lock(path, 0.3):
        pass
    with database_lock(path, 1.0):
        pass


def test_ui_command_uses_a_relative_path_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        ui_command(f"sqlite:///{tmp_path}/runs/mlflow.db") == "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"
    )
    assert ui_command("sqlite:////else/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////else/mlflow.db"
    assert ui_command("http://server") == "http://server"


@pytest.mark.parametrize("is_new", [False, True])
def test_read_only_store_raises_one_message(output, is_new):
    if is_new:
        (output / "mlflow.db").unlink()
    with read_only(output), pytest.raises(TrackingError, match="Read-only file system") as caught:
        create_run(config_in(output))
    assert "\n" not in str(caught.value)
