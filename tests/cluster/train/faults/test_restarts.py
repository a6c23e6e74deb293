"""Tests of the process that restarts a driver after it is killed or an outage ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from m2f.cluster.cli import main
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.train import driver_restarts as restarts
from m2f.cluster.train import orphans
from m2f.cluster.train.driver_restarts import run_with_restarts
from m2f.data_pipeline.errors import OutageError
from m2f.trainer.checkpoint.lease import LEASE_VARIABLE, Lease
from tests.waiting import PATIENCE_S, wait_until

HERE = Path(__file__).parent

RECIPE = """
name: restarted
datasets: {train: {shards: /data/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""


def make_config(folder, *overrides):
    return parse_recipe(RECIPE, [f"output={folder}", *overrides])


def driver(folder: Path, exit_specs: list[int | str]) -> list[str]:
    """Return a command whose successive runs end as in `exit_specs`; see `ending_driver.py`."""
    return [sys.executable, "-S", str(HERE / "ending_driver.py"), str(folder / "runs.txt"), *map(str, exit_specs)]


def runs(folder: Path) -> int:
    return len((folder / "runs.txt").read_text())


@pytest.fixture
def recorded_waits(monkeypatch):
    """Skip the pauses between drivers, and return a list to which their lengths in seconds are added."""
    found = []
    monkeypatch.setattr(restarts._Driver, "wait", lambda self, seconds: found.append(seconds))
    return found


def test_killed_driver_is_restarted(tmp_path, recorded_waits, capsys):
    assert run_with_restarts(driver(tmp_path, [-signal.SIGKILL, -signal.SIGSEGV, 0]), make_config(tmp_path)) == 0
    assert runs(tmp_path) == 3
    assert recorded_waits == [1.0, 2.0]
    assert "the driver was killed (SIGKILL)" in capsys.readouterr().err


def test_deaths_without_a_new_checkpoint_count_against_max_failures(tmp_path, recorded_waits, capsys):
    config = make_config(tmp_path, "cluster.max_failures=2")
    assert run_with_restarts(driver(tmp_path, [-signal.SIGKILL] * 9), config) == 128 + signal.SIGKILL
    assert runs(tmp_path) == 3
    assert "cluster.max_failures allows 2" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_driver_that_exits_deliberately_is_not_restarted(tmp_path, recorded_waits, status):
    assert run_with_restarts(driver(tmp_path, [status, 7]), make_config(tmp_path)) == status
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(
    ("status", "why"), [(69, "the storage or Ray did not answer"), (75, "is about to be preempted")]
)
def test_driver_is_restarted_after_outage_and_preemption(tmp_path, recorded_waits, capsys, status, why):
    assert run_with_restarts(driver(tmp_path, [status, 3]), make_config(tmp_path)) == 3
    assert runs(tmp_path) == 2
    assert why in capsys.readouterr().err


def test_driver_ended_by_ray_with_status_1_is_restarted(tmp_path, recorded_waits, capsys):
    assert run_with_restarts(driver(tmp_path, ["ray", 1, 0]), make_config(tmp_path)) == 1
    assert runs(tmp_path) == 2
    assert "the storage or Ray did not answer" in capsys.readouterr().err


def test_outages_without_a_new_checkpoint_count_against_max_failures(tmp_path, recorded_waits):
    assert run_with_restarts(driver(tmp_path, [69] * 9), make_config(tmp_path, "cluster.max_failures=2")) == 69
    assert runs(tmp_path) == 3


def test_driver_is_restarted_although_the_outage_lasts(tmp_path, recorded_waits, monkeypatch):
    def fail(*_):
        raise OutageError("s3://b/k: no answer")

    def newest_step(storage, run_folder):
        if runs(tmp_path):
            fail()
        return 4

    (tmp_path / "runs.txt").touch()
    monkeypatch.setattr(restarts, "newest_step", newest_step)
    monkeypatch.setattr(Lease, "check", fail)
    assert run_with_restarts(driver(tmp_path, [69] * 9), make_config(tmp_path, "cluster.max_failures=2")) == 69
    assert runs(tmp_path) == 3


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a parent with a driver, waits until the driver runs, and returns both processes."""
    recipe, parents = tmp_path / "recipe.yaml", []
    recipe.write_text(RECIPE + f"output: {tmp_path}\n")

    def run(signal_handling: str) -> tuple[psutil.Popen, psutil.Process]:
        driver = [sys.executable, "-S", HERE / "sleeping_driver.py", tmp_path / "runs.txt", signal_handling]
        command = [sys.executable, HERE / "restarting_parent.py", recipe, *driver]
        parents.append(psutil.Popen([str(word) for word in command], stderr=subprocess.DEVNULL))
        wait_until(lambda: parents[0].poll() is not None or ((tmp_path / "runs.txt").exists() and runs(tmp_path)))
        (child,) = parents[0].children()
        return parents[0], child

    yield run
    for parent in parents:
        if parent.poll() is None:
            parent.terminate()
        parent.wait()


@pytest.mark.parametrize(("signal_handling", "status"), [("handles", 0), ("ignores", 128 + signal.SIGTERM)])
def test_sigterm_reaches_the_driver_and_prevents_a_restart(start, tmp_path, signal_handling, status):
    parent, child = start(signal_handling)
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.wait(PATIENCE_S) == status
    assert not child.is_running()
    assert runs(tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_driver_ends_when_its_parent_is_killed(start):
    parent, child = start("handles")
    parent.kill()
    child.wait(PATIENCE_S)
    assert not child.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_process_whose_parent_died_before_its_start_ends(tmp_path):
    command = [sys.executable, "-m", orphans.__name__, "-1", "touch", str(tmp_path / "ran")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGTERM
    assert not (tmp_path / "ran").exists()


def test_user_error_is_printed_once_with_local_launcher_and_restart(tmp_path, capfd):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path}", "--launcher", "local", "--restart"]
    assert main(words) == 2
    assert capfd.readouterr().err.count("write the shards first") == 1


def test_driver_notifies_its_parent_of_a_deliberate_exit(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    reader, writer = os.pipe()
    monkeypatch.setenv(restarts.END_PIPE, str(writer))
    assert main(["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path}", "--launcher", "local"]) == 2
    os.close(writer)
    with open(reader) as end:
        assert end.read() == "."


@pytest.mark.slow
def test_restarted_driver_treats_unreachable_storage_as_outage(tmp_path, monkeypatch, capfd):
    """A restarted driver, which inherits a lease, counts an unreachable endpoint as an outage, not as a user error."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("/data/train", "s3://bucket/train"))
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv(LEASE_VARIABLE, "1:nonce")
    words = ["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path}", "--launcher", "local"]
    words += ["storage.endpoint_url=http://127.0.0.1:9", "storage.region=us-east-1", "storage.patience_s=1"]
    assert main(words) == 69
    assert "s3://bucket/train/dataset.json" in capfd.readouterr().err
