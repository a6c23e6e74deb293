"""Test of a run whose local Ray cluster loses its raylet, and whose next cluster loses its GCS."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from m2f.cluster.evaluation.queue import queue_url, read_entries
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.tracking.tracking import find_run
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.checkpoint.folder import newest_step
from tests.cluster.tiny_run import EVERY, STEPS, assert_equal_weights, small_sets, tiny_config, tracked_points
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, "struck", small_sets(str(tmp_path), Storage()))


@pytest.fixture
def parent(config, tmp_path):
    """Start the process that restarts the driver. Its output is in `driver.log`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    driver = [sys.executable, HERE / "soak_driver.py", recipe, "0.5"]
    command = [sys.executable, HERE / "restarting_parent.py", recipe, *driver]
    with (tmp_path / "driver.log").open("w") as log:
        process = psutil.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def kill_process(parent, config, step, name):
    """Wait for a checkpoint of `step`, and kill the process `name` of the driver's Ray cluster.

    Return the driver and its descendants, all of which must end.
    """
    wait_until(lambda: newest_step(Storage(), config.run_folder) >= step or parent.poll() is not None)
    (driver,) = parent.children()
    descendants = driver.children(recursive=True)
    (victim,) = [process for process in driver.children() if process.name() == name]
    victim.kill()
    return [driver, *descendants]


def test_run_survives_death_of_raylet_and_of_head(baseline_run, config, parent, tmp_path):
    ended_processes = kill_process(parent, config, EVERY, "raylet")
    ended_processes += kill_process(parent, config, 2 * EVERY, "gcs_server")
    _, left = psutil.wait_procs(ended_processes, timeout=PATIENCE_S)
    assert left == [], "a process of an old cluster is alive"
    status, output = parent.wait(PATIENCE_S), (tmp_path / "driver.log").read_text()
    assert status == 0, output
    assert output.count("m2f: Ray's raylet on this machine died") == 1, output
    assert output.count("m2f: the head of the Ray cluster died") == 1, output
    assert output.count("the driver ended because the storage or Ray did not answer") == 2, output
    run = find_run(config)
    assert tracked_points(run, "train/loss/total") == baseline_run.losses
    assert_equal_weights(config.run_folder, baseline_run.run_folder)
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert [(e.step, e.status) for e in read_entries(Storage(), queue_url(config))] == [(s, "published") for s in steps]
    assert [step for step, _ in tracked_points(run, "val/PQ")] == steps
