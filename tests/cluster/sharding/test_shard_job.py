from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from m2f.cluster.ray_cluster import existing_or_local_cluster
from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding import job
from m2f.cluster.sharding.job import run_shard_job
from m2f.cluster.sharding.report import ShardJobError
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.plan import plan_shards
from m2f.data_pipeline.shards.write import complete_parts, write_dataset, write_shard
from m2f.data_pipeline.sources import LabelMapSource, SyntheticSource, YoloSegSource
from m2f.data_pipeline.storage.storage import Storage
from tests import tool_exports
from tests.waiting import PATIENCE_S

CLUSTER = ClusterConfig(shard_tasks=2)


def digests(folder):
    names = sorted(p.relative_to(folder) for p in Path(folder).rglob("*") if p.suffix in (".tar", ".parquet"))
    return {str(n): hashlib.sha256((Path(folder) / n).read_bytes()).hexdigest() for n in names}


def start_driver(folder, num_images, few):
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("shard_driver.py"), str(folder), str(num_images), str(few)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "few"), [(290, 300), pytest.param(60, 0, marks=pytest.mark.cluster)])
def test_killed_job_continues_and_writes_the_same_bytes(tmp_path, num_images, few):
    dataset = DatasetConfig(
        shards=str(tmp_path / "undisturbed"), source=SyntheticSource(num_images=num_images), shard_mb=0.05
    )
    write_dataset(open_reader(dataset.source), dataset, Storage())
    expected = digests(tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    driver = start_driver(folder, num_images, few)
    while not list(folder.glob("parts/*.parquet")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    left = len(list(folder.glob("parts/*.parquet")))
    assert not (folder / "dataset.json").exists()
    output, log = start_driver(folder, num_images, few).communicate(timeout=PATIENCE_S)
    num_shards, written = json.loads(output.splitlines()[-1])
    assert 0 < written <= num_shards - left, log
    assert digests(folder) == expected
    assert f"{num_images}/{num_images} images" in log  # a plain line, as standard error is not a terminal


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("m2f.cluster.ray_cluster.existing_or_local_cluster", refuse)


def test_small_job_runs_in_this_process_and_writes_the_same_bytes(tmp_path, no_ray):
    """The reference is `write_dataset`. Other tests compare the shards of Ray tasks with the same reference."""
    dataset = DatasetConfig(shards=str(tmp_path / "here"), source=SyntheticSource(num_images=20), shard_mb=0.05)
    expected = replace(dataset, shards=str(tmp_path / "expected"))
    write_dataset(open_reader(dataset.source), expected, Storage())
    report = run_shard_job("train", dataset, CLUSTER, Storage())
    assert report.written_shards == report.num_shards > 1
    assert digests(tmp_path / "here") == digests(tmp_path / "expected")


@pytest.mark.parametrize(
    ("cluster", "few_images", "few_bytes"),
    [
        (CLUSTER, 19, 10**9),
        (CLUSTER, 20, 20),
        (replace(CLUSTER, address="ray.example:6379"), 20, 10**9),
    ],
)
def test_large_job_and_job_for_a_named_cluster_use_ray(tmp_path, no_ray, monkeypatch, cluster, few_images, few_bytes):
    monkeypatch.setattr(job, "MAX_LOCAL_IMAGES", few_images)
    monkeypatch.setattr(job, "MAX_LOCAL_BYTES", few_bytes)
    dataset = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=20), shard_mb=0.05)
    with pytest.raises(AssertionError, match="Ray was started"):
        run_shard_job("train", dataset, cluster, Storage())


def test_finished_job_writes_nothing(tmp_path, no_ray):
    dataset = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=6))
    write_dataset(open_reader(dataset.source), dataset, Storage())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    report = run_shard_job("train", dataset, CLUSTER, Storage())
    assert (report.written_shards, report.num_samples, report.committed) == (0, 6, True)
    assert "no new shards written" in report.summary()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_target_with_another_data_set_is_rejected(tmp_path, no_ray):
    dataset = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=6))
    write_dataset(open_reader(dataset.source), dataset, Storage())
    other = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=7))
    with pytest.raises(DataError, match="belongs to another shard plan"):
        run_shard_job("train", other, CLUSTER, Storage())


def test_yolo_data_set_of_an_earlier_version_is_completed(tmp_path, no_ray):
    """Earlier versions did not include the names of the text files in the digest of the source."""
    tool_exports.yolo_seg(tmp_path)
    source = YoloSegSource(
        images=f"{tmp_path}/images/train", labels=f"{tmp_path}/labels/train", data_yaml=f"{tmp_path}/data.yaml"
    )
    dataset = DatasetConfig(shards=f"{tmp_path}/shards", source=source, shard_mb=0.001)
    earlier = "27d54e558f3d628027af87774e9137b771fc68d18c5f8d45c37f43d26b442df7"
    plan = plan_shards(open_reader(source), dataset, earlier)
    complete_parts(plan, Storage())  # claims the folder
    write_shard(open_reader(source), plan, 0, Storage())
    report = run_shard_job("train", dataset, CLUSTER, Storage())
    assert 0 < report.written_shards == report.num_shards - 1
    assert json.loads((tmp_path / "shards/dataset.json").read_text())["source_fingerprint"] == earlier
    assert run_shard_job("train", dataset, CLUSTER, Storage()).written_shards == 0
    assert write_dataset(open_reader(source), dataset, Storage()).num_samples == 4


def test_data_set_without_source_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"set datasets\.train\.source"):
        run_shard_job("train", DatasetConfig(shards=str(tmp_path)), CLUSTER, Storage())


class FullStorage(Storage):
    """Storage that fails to write the second shard."""

    def put(self, url, data, **options):
        if url.endswith("shards/00001.tar"):
            raise StorageError("no space")
        super().put(url, data, **options)


def test_keep_going_writes_all_other_shards_before_failing(tmp_path, no_ray):
    dataset = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=12), shard_mb=0.05)
    with pytest.raises(ShardJobError, match=r"1 of \d+ shards could not be written:\n  no space\nAll are listed"):
        run_shard_job("train", dataset, CLUSTER, FullStorage(), keep_going=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == [{"index": 1, "message": "no space"}]
    assert report["written_shards"] == report["num_shards"] - 1 == len(list((tmp_path / "parts").iterdir()))
    assert not (tmp_path / "dataset.json").exists()
    assert write_dataset(open_reader(dataset.source), dataset, Storage()).num_samples == 12  # writes the missing shard


@pytest.fixture
def label_maps(tmp_path):
    """Write twelve images with label maps, of which image 07 is truncated, and return their source."""
    raw = tmp_path / "raw"
    for name in ("images", "labels"):
        (raw / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(12):
        cv2.imwrite(str(raw / "images" / f"{i:02}.png"), random.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        cv2.imwrite(str(raw / "labels" / f"{i:02}.png"), random.integers(0, 2, (24, 32), dtype=np.uint8))
    broken = raw / "images" / "07.png"
    broken.write_bytes(broken.read_bytes()[:200])
    categories = [{"label": i, "name": n, "color": [i, 9, 9], "isthing": i} for i, n in enumerate(("sky", "car"))]
    (raw / "categories.json").write_text(json.dumps(categories))
    return LabelMapSource(
        images=str(raw / "images"), labels=str(raw / "labels"), categories=str(raw / "categories.json")
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_bad_image_is_reported_and_prevents_the_commit(tmp_path, label_maps):
    target = tmp_path / "shards"
    dataset = DatasetConfig(shards=str(target), source=label_maps, shard_mb=0.01)
    with existing_or_local_cluster(CLUSTER, CLUSTER.shard_tasks):
        with pytest.raises(DataError, match=r"1 of 12 samples cannot be used, so the data set is not commi") as caught:
            run_shard_job("train", dataset, CLUSTER, Storage())
        assert "07.png" in str(caught.value)
        assert not (target / "dataset.json").exists()
        report = json.loads((target / "report.json").read_text())
        assert [problem["key"] for problem in report["problems"]] == ["07"]
        assert run_shard_job("train", dataset, CLUSTER, Storage(), skip_bad=True).committed
    assert Manifest.load(str(target), Storage()).num_samples == 11
    again = run_shard_job("train", dataset, CLUSTER, Storage(), skip_bad=True)
    assert again.written_shards == 0
    assert len(again.problems) == 1


def make_killing_storage(target, kill_at, failing_object, marker_folder):
    """Return a storage that kills its process halfway through the first write of each object in `kill_at`.

    `failing_object` cannot be written at all.
    """
    marker_folder.mkdir()

    class KillingStorage(Storage):
        def put(self, url, data, **options):
            name = url.removeprefix(f"{target}/")
            marker = marker_folder / name.replace("/", "-")
            if name in kill_at and not marker.exists():
                marker.write_text(str(os.getpid()))
                half = Path(url).with_name(".partial-killed")
                half.parent.mkdir(parents=True, exist_ok=True)
                half.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name == failing_object:
                raise StorageError(f"{url}: no space; free some")
            super().put(url, data, **options)

    return KillingStorage()


@pytest.mark.cluster
@pytest.mark.slow
def test_killed_tasks_are_retried_and_a_failed_shard_is_written_by_the_next_job(tmp_path):
    reference, folder, marker_folder = tmp_path / "whole", tmp_path / "killed", tmp_path / "marks"
    dataset = DatasetConfig(shards=str(reference), source=SyntheticSource(num_images=24), shard_mb=0.05)
    write_dataset(open_reader(dataset.source), dataset, Storage())
    dataset = replace(dataset, shards=str(folder))
    kill_at = ("shards/00001.tar", "parts/00002.parquet")
    failing = make_killing_storage(folder, kill_at, "shards/00000.tar", marker_folder)
    with existing_or_local_cluster(CLUSTER, CLUSTER.shard_tasks):
        with pytest.raises(ShardJobError, match=r"1 of \d+ shards could not be written:\n.*00000.tar: no space"):
            run_shard_job("train", dataset, CLUSTER, failing, keep_going=True)
        killed = {marker.read_text() for marker in marker_folder.iterdir()}
        assert len(killed) == len(kill_at)
        assert str(os.getpid()) not in killed
        written = digests(folder)
        assert "parts/00000.parquet" not in written
        assert all(f"shards/{name}" in written for name in ("00001.tar", "00002.tar"))
        report = run_shard_job("train", dataset, CLUSTER, Storage())
    assert report.committed
    assert report.written_shards == 1
    assert digests(folder) == digests(reference)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_kills_of_drivers_and_tasks_do_not_change_the_shards(tmp_path):
    """The test kills five drivers after random shares of the work, then five tasks halfway through random objects."""
    num_images, rng = job.MAX_LOCAL_IMAGES + 20, random.Random(10)
    reference, folder = tmp_path / "whole", tmp_path / "killed"
    dataset = DatasetConfig(shards=str(reference), source=SyntheticSource(num_images=num_images), shard_mb=0.05)
    num_shards = len(write_dataset(open_reader(dataset.source), dataset, Storage()).shards)
    for _ in range(5):
        driver = start_driver(folder, num_images, 0)
        target_parts = len(list(folder.glob("parts/*.parquet"))) + rng.randint(1, num_shards // 8)
        while len(list(folder.glob("parts/*.parquet"))) < target_parts:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.002)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        assert not (folder / "dataset.json").exists()
    missing = [i for i in range(num_shards) if not (folder / f"parts/{i:05d}.parquet").exists()]
    names = ("shards/{:05d}.tar", "parts/{:05d}.parquet")
    kill_at = [rng.choice(names).format(index) for index in rng.sample(missing, 5)]
    with existing_or_local_cluster(CLUSTER, CLUSTER.shard_tasks):
        failing = make_killing_storage(folder, kill_at, "", tmp_path / "marks")
        report = run_shard_job("train", replace(dataset, shards=str(folder)), CLUSTER, failing)
    assert len(list((tmp_path / "marks").iterdir())) == len(kill_at)
    assert report.written_shards == len(missing)
    assert digests(folder) == digests(reference)
