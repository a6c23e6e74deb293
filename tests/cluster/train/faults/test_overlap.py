"""Tests of a second start of a run whose first start is still training, killed or suspended."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

import m2f
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.tracking.tracking import find_run
from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.trainer.checkpoint.folder import list_checkpoints, newest_step, verify_sizes
from m2f.trainer.checkpoint.lease_record import newest_number
from m2f.trainer.config import CheckpointConfig
from tests.cluster.tiny_run import assert_equal_weights, small_sets, tiny_config

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("leased_driver.py")
STEPS = 16
TIMEOUT_S = 280
OVERLAPS = int(os.environ.get("M2F_SOAK_OVERLAPS", "40"))


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    datasets = small_sets(str(folder), Storage())

    def make(name: str):
        config = replace(tiny_config(folder, name, datasets), evaluation=EvaluationConfig())
        checkpoint = CheckpointConfig(every_steps=2, keep=100)
        return replace(config, training=replace(config.training, max_steps=STEPS, checkpoint=checkpoint))

    return make


@pytest.fixture(scope="module")
def baseline(make_config):
    config = make_config("baseline")
    assert train_locally(config).status == "finished"
    return config


class Driver:
    """A process of `leased_driver.py` with its log. Its ranks wait at the gate in step `gate_step`.

    `kind` is how the run's first start is disturbed, see `overlap`.
    """

    def __init__(self, config, log: Path, kind: str, gate_step: int) -> None:
        recipe = log.with_suffix(".yaml")
        recipe.write_text(dump_recipe(config))
        self.log, self.gate = log, log.with_suffix(".gate")
        start_method = "spawn" if kind == "kill" else "fork"
        expiry_s = "60" if kind == "live" else "2"  # a live start that is starved keeps its lease
        with log.open("w") as file:
            self.process = psutil.Popen(
                [sys.executable, str(DRIVER), start_method, expiry_s, str(self.gate), str(gate_step), str(recipe)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(Path(m2f.__file__).parents[1])},
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def suspend(self, database: Path) -> None:
        """Stop the process with SIGSTOP at a moment when it holds no lock on its MLflow database.

        Otherwise the second start would fail because the database is locked, which is not what these tests are about.
        """

        def is_suspended() -> bool:
            self.process.send_signal(signal.SIGSTOP)
            self.wait_until(lambda: self.process.status() == psutil.STATUS_STOPPED)
            if is_unlocked(database):
                return True
            self.process.send_signal(signal.SIGCONT)
            return False

        self.wait_until(is_suspended)

    def ranks(self) -> list[psutil.Process]:
        return [child for child in self.process.children() if "spawn_main" in " ".join(child.cmdline())]


def is_unlocked(database: Path) -> bool:
    connection = sqlite3.connect(database, timeout=0)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


@pytest.fixture
def start(tmp_path) -> Iterator:
    drivers: list[Driver] = []

    def new(config, kind: str, gate_step: int = STEPS + 1) -> Driver:
        drivers.append(Driver(config, tmp_path / f"driver{len(drivers)}.log", kind, gate_step))
        return drivers[-1]

    yield new
    for driver in drivers:
        if driver.process.is_running():
            for process in (driver.process, *driver.process.children(recursive=True)):
                process.kill()
        driver.process.wait()


def losses(config) -> list[tuple[int, float]]:
    run = find_run(config)
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "train/loss/total")
    return sorted((point.step, point.value) for point in points)


def check(config, baseline) -> None:
    """Assert that losses and weights equal those of the undisturbed run, and that all checkpoints are complete."""
    assert losses(config) == losses(baseline)
    for checkpoint in list_checkpoints(Storage(), config.run_folder):
        verify_sizes(Storage(), checkpoint.url)
    assert_equal_weights(config.run_folder, baseline.run_folder)


def test_ranks_end_when_their_launcher_is_killed(make_config, start):
    first = start(make_config("orphans"), "kill", gate_step=2)
    first.wait_until(lambda: "step  1/" in first.log.read_text())
    ranks = first.ranks()
    assert len(ranks) == 2
    first.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
    assert not alive


def overlap(config, baseline, start, kind: str, rng: random.Random) -> None:
    """Start a run that waits at its gate, then start it a second time.

    Before the second start, the first one is killed (`kill`), suspended (`stop`) or left running (`live`).
    """
    committed = 2 * rng.randint(1, 4)
    first = start(config, kind, gate_step=committed + rng.randint(1, 2))
    first.wait_until(lambda: newest_step(Storage(), config.run_folder) >= committed)
    if kind == "kill":
        first.process.kill()
    elif kind == "stop":
        first.suspend(Path(config.output, "mlflow.db"))
    second = start(config, kind)
    second.process.wait(TIMEOUT_S)
    if kind == "live":
        assert "is training in this folder (lease 1)" in second.log.read_text()
    else:
        assert "run finished" in second.log.read_text()
        assert newest_number(Storage(), config.run_folder) == 2
    first.gate.touch()
    if kind == "stop":
        first.process.send_signal(signal.SIGCONT)
    first.process.wait(TIMEOUT_S)
    if kind == "stop":
        assert "took over this run with lease 2" in first.log.read_text()
    check(config, baseline)


@pytest.mark.parametrize("kind", ["live", "stop"])
def test_second_start_of_a_run_leaves_metrics_and_checkpoints_of_one_run(make_config, baseline, start, kind):
    overlap(make_config(kind), baseline, start, kind, random.Random(0))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(OVERLAPS))
def test_many_second_starts_leave_metrics_and_checkpoints_of_one_run(make_config, baseline, start, number):
    kind = ("stop", "kill", "stop", "live")[number % 4]
    overlap(make_config(f"soak{number}"), baseline, start, kind, random.Random(number))
