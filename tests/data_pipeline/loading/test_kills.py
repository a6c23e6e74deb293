"""Sharding and reading are killed with SIGKILL at random moments: the same bytes and the same samples come out."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from m2f.data_pipeline.config import (
    CacheConfig,
    DataConfig,
    DatasetConfig,
    LargeScaleJitter,
    MixtureItem,
    SyntheticSource,
)
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.storage.storage import Storage

SHARDING = """
import sys
from m2f.data_pipeline.config import DatasetConfig, SyntheticSource
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards import write_dataset
from m2f.data_pipeline.storage import Storage
folder, images = sys.argv[1], int(sys.argv[2])
config = DatasetConfig(shards=folder, source=SyntheticSource(num_images=images, seed=8), shard_mb=0.05)
write_dataset(open_reader(config.source), config, Storage())
"""

# Every finished step is one line, so that a killed reader goes on where the last whole line ends.
READING = """
import sys
sys.path.insert(0, sys.argv[1])
from test_kills import read_steps
folder, log, steps, workers, cache = sys.argv[2:]
read_steps(folder, log, int(steps), int(workers), cache)
"""

BATCH = 4


def read_steps(folder, log, steps, workers, cache):
    """Go on with the log of (position, key, pixels) where it ends."""
    path = Path(log)
    whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    path.write_text("".join(whole))
    manifest = Manifest.load(folder, Storage())
    data = DataConfig(
        train=(MixtureItem(dataset="a"),),
        augment=LargeScaleJitter(size=48),
        workers=workers,
        chunk_mb=0.03,
        lanes=6,
        window=8,
        cache=CacheConfig(folder=cache, max_gb=0.0002) if cache else None,
    )
    spec = LoaderSpec(global_batch=BATCH, micro_batch=2, rank=0, world=1, start_step=len(whole), seed=5)
    loader = build_loader([manifest], build_order([manifest], 5, data), data, Storage(), spec)
    with path.open("a") as file:
        for step in islice(loader, steps - len(whole)):
            rows = [
                (position, key, hashlib.sha256(batch.images[row].numpy().tobytes()).hexdigest())
                for batch in step.micro_batches
                for row, (position, key) in enumerate(zip(batch.targets.position.tolist(), batch.keys, strict=True))
            ]
            file.write(json.dumps(rows) + "\n")
            file.flush()
    loader.close()


def start(script, *words):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    words = [str(word) for word in words]
    return subprocess.Popen([sys.executable, "-c", script, *words], env=environment, stderr=subprocess.PIPE, text=True)


def kill_and_finish(begin, progress, total, kills, seed):
    """Start again and again: killed a moment after a random amount of new work, the last time left alone."""
    chance = random.Random(seed)
    for kill in range(kills):
        process = begin()
        wanted = min(total - 1, progress() + chance.randint(0, max(1, total // kills)))
        while process.poll() is None and progress() < wanted:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert progress() < total, f"finished before kill {kill}"
    last = begin()
    _, errors = last.communicate(timeout=240)
    assert last.returncode == 0, errors


def digests(folder):
    kept = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".partial-"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def undisturbed_shards(folder, images):
    config = DatasetConfig(shards=str(folder), source=SyntheticSource(num_images=images, seed=8), shard_mb=0.05)
    return write_dataset(open_reader(config.source), config, Storage())


def kill_sharding(tmp_path, images, kills):
    whole = undisturbed_shards(tmp_path / "whole", images)
    folder = tmp_path / "killed"
    kill_and_finish(
        lambda: start(SHARDING, folder, images),
        lambda: len(list(folder.glob("parts/*.parquet"))) + (folder / "dataset.json").exists(),
        len(list((tmp_path / "whole" / "parts").iterdir())) + 1,
        kills,
        seed=kills,
    )
    assert digests(folder) == digests(whole.url)
    assert verify(str(folder), Storage(), "full").passed


def kill_reading(tmp_path, images, steps, kills, workers):
    manifest = undisturbed_shards(tmp_path / "set", images)
    read_steps(manifest.url, tmp_path / "whole.log", steps, 0, "")
    log, cache = tmp_path / "killed.log", tmp_path / "cache"
    kill_and_finish(
        lambda: start(READING, Path(__file__).parent, manifest.url, log, steps, workers, cache),
        lambda: log.read_text().count("\n") if log.exists() else 0,
        steps,
        kills,
        seed=kills,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "whole.log").read_text().splitlines()]
    assert sorted(row[0] for line in lines for row in line) == list(range(steps * BATCH))


def test_killed_sharding_ends_with_the_same_bytes(tmp_path):
    kill_sharding(tmp_path, images=40, kills=1)


def test_killed_reading_goes_on_with_the_same_samples(tmp_path):
    kill_reading(tmp_path, images=20, steps=30, kills=1, workers=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_ten_kills_of_sharding(tmp_path):
    kill_sharding(tmp_path, images=400, kills=10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_ten_kills_of_reading_with_processes_and_a_cache(tmp_path):
    kill_reading(tmp_path, images=120, steps=400, kills=10, workers=2)
