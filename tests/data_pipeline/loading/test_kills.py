"""Sharding and reading that are killed with SIGKILL at random times produce the same bytes and samples."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.loading.reading_main import BATCH, read_steps
from tests.data_pipeline.loading.sharding_main import write_shards
from tests.waiting import PATIENCE_S


def start_script(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(Path(__file__).with_name(script)), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def kill_and_finish(start, progress, total, kills, seed):
    """Kill the process `kills` times, each time shortly after a random amount of new work; then let it finish."""
    rng = random.Random(seed)
    for kill in range(kills):
        process = start()
        target = min(3 * total // 4, progress() + rng.randint(0, max(1, total // kills)))
        while process.poll() is None and progress() < target:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert progress() < total, f"finished before kill {kill}"
    final = start()
    _, errors = final.communicate(timeout=PATIENCE_S)
    assert final.returncode == 0, errors


def digests(folder):
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".partial-"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def kill_sharding(tmp_path, images, kills):
    reference = write_shards(tmp_path / "whole", images)
    folder = tmp_path / "killed"
    kill_and_finish(
        lambda: start_script("sharding_main.py", folder, images),
        lambda: len(list(folder.glob("parts/*.parquet"))) + (folder / "dataset.json").exists(),
        len(list((tmp_path / "whole" / "parts").iterdir())) + 1,
        kills,
        seed=kills,
    )
    assert digests(folder) == digests(reference.url)
    assert verify(str(folder), Storage(), "full").passed


def kill_reading(tmp_path, images, steps, kills, workers):
    manifest = write_shards(tmp_path / "set", images)
    read_steps(manifest.url, tmp_path / "whole.log", steps, 0, "")
    log, cache = tmp_path / "killed.log", tmp_path / "cache"
    kill_and_finish(
        lambda: start_script("reading_main.py", manifest.url, log, steps, workers, cache),
        lambda: log.read_text().count("\n") if log.exists() else 0,
        steps,
        kills,
        seed=kills,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "whole.log").read_text().splitlines()]
    assert sorted(row[0] for line in lines for row in line) == list(range(steps * BATCH))


def test_restarted_sharding_writes_the_same_bytes(tmp_path):
    kill_sharding(tmp_path, images=40, kills=1)


def test_restarted_reading_continues_with_the_same_samples(tmp_path):
    kill_reading(tmp_path, images=20, steps=30, kills=1, workers=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_sharding_killed_ten_times_writes_the_same_bytes(tmp_path):
    kill_sharding(tmp_path, images=400, kills=10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_reading_killed_ten_times_with_workers_and_cache_yields_the_same_samples(tmp_path):
    kill_reading(tmp_path, images=120, steps=400, kills=10, workers=2)
