"""A recording of batches equals the batches of the loader."""

import json
import os
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import m2f
from benchmarks.record_batches import record
from benchmarks.recording import Recording
from benchmarks.train_recorded import train_recorded
from m2f.cluster.train.compose import compose_job
from m2f.cluster.train.launch import launch
from m2f.cluster.train.local_rank import worker_environment
from m2f.data_pipeline.config import ScaleJitter
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.loader import LoaderSpec
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.data import open_shards
from m2f.trainer.worker import run_worker
from tests.cluster.tiny_run import small_sets, tiny_config

STEPS = 3
REPOSITORY = Path(m2f.__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    config = tiny_config(folder, "live", small_sets(str(folder), Storage()))
    return replace(config, training=replace(config.training, precision="fp32"))


@pytest.fixture(scope="module")
def lossless(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("lossless") / "shapes.zip"
    assert record(config, path, STEPS, quality=None) == STEPS
    return path


def steps_of(data, config, spec, count):
    with closing(data.steps(compose_job(config), Storage(), spec, 0)) as steps:
        return list(islice(steps, count))


def spec_of(config, **settings):
    whole = {"global_batch": 4, "micro_batch": 2, "rank": 0, "world": 1, "start_step": 0, "seed": config.seed}
    return LoaderSpec(**whole | settings)


def differences(recorded, live):
    """Return the largest difference of pixels, and assert that everything else is equal."""
    assert [step.positions for step in recorded] == [step.positions for step in live]
    assert [step.step for step in recorded] == [step.step for step in live]
    pairs = [
        pair
        for steps in zip(recorded, live, strict=True)
        for pair in zip(*(step.micro_batches for step in steps), strict=True)
    ]
    for mine, other in pairs:
        assert (mine.keys, mine.dropped_targets) == (other.keys, other.dropped_targets)
        assert torch.equal(mine.sizes, other.sizes)
        assert mine.images.stride() == other.images.stride()
        for field in fields(mine.targets):
            assert torch.equal(getattr(mine.targets, field.name), getattr(other.targets, field.name)), field.name
    return max(int((mine.images.int() - other.images.int()).abs().max()) for mine, other in pairs)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
@pytest.mark.parametrize("augment", [None, ScaleJitter(shortest_edges=(48, 80), max_size=128)], ids=["lsj", "scale"])
def test_recorded_batches_equal_those_of_the_loader(config, tmp_path, task, augment):
    data = replace(config.data, task=task, augment=augment or config.data.augment)
    config = replace(config, data=data)
    record(config, tmp_path / "r.zip", STEPS, quality=None)
    recording, live = Recording.load(tmp_path / "r.zip"), open_shards(compose_job(config), Storage())
    assert recording.num_classes == compose_job(config).model.num_classes
    for spec in (spec_of(config), spec_of(config, rank=1, world=3, start_step=1)):
        count = STEPS - spec.start_step
        assert differences(steps_of(recording, config, spec, count), steps_of(live, config, spec, count)) == 0


def test_jpeg_changes_only_pixels_and_only_slightly(config, lossless, tmp_path):
    record(config, tmp_path / "small.zip", STEPS, quality=95)
    assert (tmp_path / "small.zip").stat().st_size < 0.6 * lossless.stat().st_size
    exact, small = (Recording.load(path) for path in (lossless, tmp_path / "small.zip"))
    assert exact.fingerprint != small.fingerprint
    spec = spec_of(config)
    assert 0 < differences(steps_of(small, config, spec, STEPS), steps_of(exact, config, spec, STEPS)) < 64


def test_recorded_batches_are_pinned_if_requested(config, lossless, monkeypatch):
    recording, pinned = Recording.load(lossless), []
    plain = steps_of(recording, config, spec_of(config), 1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    assert differences(steps_of(recording, config, spec_of(config, pin=True), 1), plain) == 0
    assert len(pinned) >= 2 * 10  # each of the two micro-batches has ten tensors


def test_longer_run_repeats_images_with_new_positions(config, lossless):
    first, *_, again = steps_of(Recording.load(lossless), config, spec_of(config), STEPS + 1)
    assert again.positions == tuple(range(STEPS * 4, STEPS * 4 + 4))
    assert [batch.keys for batch in again.micro_batches] == [batch.keys for batch in first.micro_batches]


def test_recording_contains_as_many_steps_as_fit(config, lossless, tmp_path):
    limit = 0.6 * lossless.stat().st_size / 1e6
    with pytest.raises(ConfigError, match=r"1 of 3 steps of 4 images fit into .* MB; lower --steps or --quality"):
        record(config, tmp_path / "r.zip", STEPS, max_mb=limit, quality=None)
    assert not (tmp_path / "r.zip").exists()
    with pytest.raises(ConfigError, match="0 of 1 steps"):
        record(config, tmp_path / "r.zip", None, max_mb=0.001, quality=None)
    assert record(config, tmp_path / "r.zip", None, max_mb=limit, quality=None) == 1
    assert (tmp_path / "r.zip").stat().st_size <= limit * 1e6


def test_invalid_recordings_are_refused(lossless, tmp_path):
    path = tmp_path / "r.zip"
    path.write_bytes(lossless.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read as a recording"):
        Recording.load(path)
    with zipfile.ZipFile(lossless) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def write(compression=zipfile.ZIP_STORED, **changed):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in (members | changed).items():
                archive.writestr(name, data)

    write(zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"images/000000.png is compressed"):
        Recording.load(path)
    write(**{"images.json": json.dumps(json.loads(members["images.json"]) | {"format": 2})})
    with pytest.raises(DataError, match="has format 2, but this version reads 1"):
        Recording.load(path)


def test_training_from_a_recording_needs_few_packages():
    missing = "ray,mlflow,webdataset,boto3,pycocotools,jsonschema,rich"
    words = [REPOSITORY / "tests" / "import_without.py", missing, "benchmarks.train_recorded", "m2f.trainer.worker"]
    subprocess.run([sys.executable, *words], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


def losses_of(run_folder):
    """Return {step: loss} of every attempt."""
    traces = sorted(Path(run_folder, "traces").glob("*/rank_0000.jsonl"))
    lines = ([json.loads(line) for line in trace.read_text().splitlines()] for trace in traces)
    return [{line["step"]: line["loss_share"] for line in attempt} for attempt in lines]


@pytest.mark.slow
def test_training_from_a_recording_equals_training_from_the_shards(config, lossless, tmp_path, monkeypatch):
    """This includes resuming from the checkpoint of step 2."""
    settings = ["training.max_steps=3", "training.checkpoint.every_steps=2", "cluster.num_workers=1"]
    training = replace(config.training, max_steps=3)
    job = replace(compose_job(replace(config, training=training)), run_folder=str(tmp_path / "live"))
    launch(run_worker, (job,), 1, worker_environment(config))
    (live,) = losses_of(job.run_folder)

    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        folder = train_recorded(os.path.relpath(lossless), [*settings, "name=recorded"])
        (Path(folder) / "checkpoints/step_00000003/manifest.json").unlink()
    assert folder == str(tmp_path / "runs/recorded")
    whole, resumed = losses_of(folder)
    assert list(live) == [1, 2, 3]
    assert (whole, resumed) == (live, {3: live[3]})
