"""Soak tests: repeated kills of workers, evaluation actors and drivers do not change the results of a run."""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from m2f.cluster.evaluation.queue import queue_url, read_entries
from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.tracking.tracking import find_run
from m2f.cluster.train.local import train_locally
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.config import EvaluationConfig
from m2f.trainer.checkpoint.folder import newest_step
from m2f.trainer.config import CheckpointConfig
from tests.cluster.tiny_run import assert_equal_weights, small_sets, tiny_config

KILLS = int(os.environ.get("M2F_SOAK_KILLS", "20"))
STEPS, EVERY = 5 * KILLS, 5
TARGETS = ("RayTrainWorker", "EvaluationActor", "driver")
TIMEOUT_S = 120.0 * KILLS

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(TIMEOUT_S + 300)]


class Run:
    """A training run with methods that kill its processes. A killed driver is started again."""

    def __init__(self, recipe, log, poll_s=0.5):
        self.recipe, self.log = recipe, log
        self.driver = self._start(poll_s)

    def _start(self, poll_s=0.5):
        environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        command = [sys.executable, Path(__file__).with_name("soak_driver.py"), str(self.recipe), str(poll_s)]
        return subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def note(self, line):
        """Write a line to the log of the drivers."""
        self.log.write(f"{line}\n")
        self.log.flush()

    def finished(self):
        code = self.driver.poll()
        assert code in (None, 0), f"the driver ended with {code}"
        return code == 0

    def kill(self, target, rng):
        """Kill one random process of the kind `target` with SIGKILL, and return whether one was killed."""
        descendants = psutil.Process(self.driver.pid).children(recursive=True)
        if target == "driver":
            self.driver.kill()
            self.driver.wait()
            psutil.wait_procs(descendants, timeout=30)  # they end after their driver
            self.driver = self._start()
            return True
        found = [process for process in descendants if title(process).startswith(f"ray::{target}")]
        with suppress(psutil.NoSuchProcess):  # it may have ended by itself
            for process in rng.sample(found, min(1, len(found))):
                process.kill()
                return True
        return False


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # the process has just ended
        return ""


def kill_repeatedly(run, config, rng):
    """Kill `KILLS` processes, in random order and at random times, with about the same number for every target.

    Before a kill, wait for a checkpoint only if there is less than one for every two kills so far. Some kills therefore
    come without a new checkpoint since the last kill.
    """

    def wait_until(condition):
        while not condition() and not run.finished():
            assert time.monotonic() - started_at < TIMEOUT_S, "the run takes too long"
            time.sleep(0.2)

    started_at = time.monotonic()
    targets = (TARGETS * KILLS)[:KILLS]
    for count, target in enumerate(rng.sample(targets, KILLS)):
        step = newest_step(Storage(), config.run_folder)
        if step < EVERY * count // 2:
            wait_until(lambda step=step: newest_step(Storage(), config.run_folder) > step)
        time.sleep(rng.uniform(0, 6))
        wait_until(lambda target=target: run.kill(target, rng))
        assert not run.finished(), f"the run was over after {count} kills"
        run.note(f"{time.time():.1f} s: kill {count + 1}, {target}, after checkpoint step {step}")
    wait_until(run.finished)


def wait_for_step(config, step):
    deadline = time.monotonic() + TIMEOUT_S
    while newest_step(Storage(), config.run_folder) < step:
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.1)


def history(config, metric):
    run = find_run(config)
    assert run is not None
    points = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_repeated_kills_do_not_change_results(tmp_path):
    base = tiny_config(tmp_path, "killed", small_sets(str(tmp_path), Storage()))
    training = replace(base.training, max_steps=STEPS, checkpoint=CheckpointConfig(every_steps=EVERY, keep=2))
    config = replace(base, training=training, cluster=ClusterConfig(num_workers=2, max_failures=3 * KILLS))
    baseline = replace(config, name="baseline", evaluation=EvaluationConfig())
    train_locally(baseline)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    started_at = time.monotonic()
    with (tmp_path / "driver.log").open("w") as log:
        run = Run(recipe, log)
        try:
            kill_repeatedly(run, config, random.Random(0))
        finally:
            run.driver.kill()
    print(f"{KILLS} kills, {time.monotonic() - started_at:.0f} s")  # noqa: T201
    assert history(config, "train/loss/total") == history(baseline, "train/loss/total")
    assert_equal_weights(config.run_folder, baseline.run_folder)
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert [(e.step, e.status) for e in read_entries(Storage(), queue_url(config))] == [(s, "published") for s in steps]
    assert [step for step, _ in history(config, "val/PQ")] == steps


def test_metrics_not_received_by_a_killed_driver_are_logged_after_restart(tmp_path):
    """The first driver does not poll its workers, so the metrics until its death are only in the run folder."""
    base = tiny_config(tmp_path, "deaf", small_sets(str(tmp_path), Storage()))
    training = replace(base.training, max_steps=15, checkpoint=CheckpointConfig(every_steps=EVERY, keep=1))
    config = replace(base, training=training, evaluation=EvaluationConfig())
    baseline = replace(config, name="baseline")
    train_locally(baseline)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    with (tmp_path / "driver.log").open("w") as log:
        run = Run(recipe, log, poll_s=TIMEOUT_S)
        try:
            wait_for_step(config, 2 * EVERY)
            assert history(config, "train/loss/total") == []
            run.kill("driver", random.Random(0))
            run.driver.wait(TIMEOUT_S)
        finally:
            run.driver.kill()
    assert run.finished()
    assert history(config, "train/loss/total") == history(baseline, "train/loss/total")
