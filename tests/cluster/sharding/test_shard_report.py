"""Tests of the report of a sharding job without Ray: problems, repairs, and changed or missing source files."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding.job import run_shard_job
from m2f.cluster.sharding.report import ShardJobError
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import SampleProblem, count_problems
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet, H, W


@pytest.fixture
def job(tmp_path):
    """Return a function that writes a COCO set, shards it with `skip_bad`, and returns the report."""

    def run(coco, kind="instances", **options):
        coco.write()
        dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=getattr(coco, f"{kind}_source"))
        return run_shard_job("train", dataset, ClusterConfig(), Storage(), **({"skip_bad": True} | options))

    return run


def test_report_is_written_when_every_sample_is_bad(tmp_path, job):
    coco = CocoSet(tmp_path)
    coco.files["a.jpg"] = b"no image"
    with pytest.raises(DataError, match="none of the samples of the source can be used"):
        job(coco)
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    assert not report["committed"]
    assert [problem["is_in_shard"] for problem in report["problems"]] == [False]


def test_report_stores_bad_annotations_and_repairs(tmp_path, job):
    coco = CocoSet(tmp_path)
    coco.instances[0]["segmentation"] = None
    coco.instances[1]["id"] = "two"
    report = job(coco)
    assert "train: 1 sample in 1 shard" in report.summary()
    assert "annotation 1 has no usable" in report.summary()
    assert "1 annotations with a missing" in report.summary()
    again = job(coco)
    assert (again.problems, again.repairs) == (report.problems, report.repairs)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"problems": [{"from": "a newer version"}]}'])
def test_damaged_report_of_committed_shards_is_one_message(tmp_path, job, content):
    job(CocoSet(tmp_path))
    (tmp_path / "shards" / "report.json").write_text(content)
    with pytest.raises(ShardJobError, match=r"report\.json cannot be read .*; delete it, the shards do not need it"):
        job(CocoSet(tmp_path))


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_invalid_category_id_fails_before_writing_and_is_reported_with_skip_bad(tmp_path, job, kind):
    coco = CocoSet(tmp_path)
    entry = coco.instances[1] if kind == "instances" else coco.panoptic[0]["segments_info"][1]
    entry["category_id"] = "kitten"
    name = "annotation 2" if kind == "instances" else "annotation of image 40, segment 70000"
    with pytest.raises(DataError, match=f"leave them out with --skip-bad:\n.*{kind}.json: {name}: category_id"):
        job(coco, kind, skip_bad=False)
    assert not (tmp_path / "shards").exists(), "before anything is written"
    report = job(coco, kind)
    assert report.committed
    assert f"{kind}.json: {name}: category_id is 'kitten', not a whole number" in report.summary()
    assert "1 sample in 1 shard" in report.summary()
    again = job(coco, kind, skip_bad=False)
    assert again.problems == report.problems, "committed shards must stay"


def test_bad_panoptic_segment_is_reported(tmp_path, job):
    coco = CocoSet(tmp_path)
    coco.panoptic[0]["segments_info"][0]["area"] = -1
    with pytest.raises(DataError, match=r"1 annotation cannot be used.*--skip-bad"):
        job(coco, "panoptic", skip_bad=False)
    report = job(coco, "panoptic")
    (problem,) = report.problems
    assert problem.is_in_shard
    assert "segment 5: area is -1" in report.summary()


def test_shard_of_a_changed_image_is_rewritten_and_reported(tmp_path, job):
    coco = CocoSet(tmp_path)
    first = job(coco)
    assert (first.written_shards, first.notes) == (1, ())
    assert "no new shards written" in job(coco).summary()
    path = tmp_path / "images" / "a.jpg"
    coco.files["a.jpg"] += b"\0"
    report = job(coco)
    assert report.written_shards == 1
    assert f"changed: 1 source file ({path}); rewritten: 1 shard" in report.summary()
    assert job(coco).written_shards == 0
    assert job(coco, redo=True).written_shards == 1


def test_data_set_is_withdrawn_while_a_source_file_is_damaged(tmp_path, job):
    coco = CocoSet(tmp_path)
    job(coco)
    good, coco.files["a.jpg"] = coco.files["a.jpg"], b"no image"
    with pytest.raises(DataError, match=r"changed: 1 source file \((.|\n)*a.jpg: it is not a JPEG"):
        job(coco, skip_bad=False)
    assert not (tmp_path / "shards" / "dataset.json").exists()
    coco.files["a.jpg"] = good
    assert job(coco, skip_bad=False).committed


def test_missing_source_files_and_untracked_shards_are_reported(tmp_path, job, capsys):
    coco = CocoSet(tmp_path)
    job(coco)
    later = (tmp_path / "images" / "a.jpg").stat().st_mtime + 100
    os.utime(tmp_path / "images" / "a.jpg", (later, later))
    coco.files.clear()
    assert job(coco).notes == ()
    assert capsys.readouterr().err.count("comparing their contents") == 1
    (tmp_path / "images" / "a.jpg").unlink()
    report = job(coco)
    assert report.written_shards == 0
    assert report.notes == ("missing: 1 source file; the existing shards are kept",)
    shutil.rmtree(tmp_path / "shards" / "sources")
    assert "--redo rewrites the data set" in job(coco).summary()


def test_shards_of_deleted_images_are_kept_and_redo_is_refused(tmp_path):
    coco = CocoSet(tmp_path)
    (image,), pixels = coco.images, np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    coco.images = [{**image, "id": 40 + i, "file_name": f"{i}.png"} for i in range(6)]
    coco.files = {f"{i}.png": encode_png(pixels) for i in range(6)}
    coco.write()
    dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source, shard_mb=0.005)
    first = run_shard_job("train", dataset, ClusterConfig(), Storage())
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()  # such as a folder that is not mounted
    again = run_shard_job("train", dataset, ClusterConfig(), Storage())
    assert again.num_shards == first.num_shards > 1
    assert again.notes == ("missing: 6 source files; the existing shards are kept",)
    with pytest.raises(DataError, match=r"6 source files of the shards .* \(.*0\.png, .*1\.png, .*2\.png and 3 more\)"):
        run_shard_job("train", dataset, ClusterConfig(), Storage(), redo=True)
    assert Manifest.load(dataset.shards, Storage()).num_samples == 6


def test_other_shard_mb_keeps_the_shards_until_redo(tmp_path):
    dataset = DatasetConfig(shards=str(tmp_path), source=SyntheticSource(num_images=6), shard_mb=0.05)
    count = run_shard_job("train", dataset, ClusterConfig(), Storage()).num_shards
    larger = replace(dataset, shard_mb=1.0)
    report = run_shard_job("train", larger, ClusterConfig(), Storage())
    assert (report.num_shards, report.written_shards) == (count, 0)
    assert f"kept: {count} shards; with the present files and shard_mb, a new data set would have 1" in report.summary()
    assert run_shard_job("train", larger, ClusterConfig(), Storage(), redo=True).num_shards == 1


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["shards/00000.tar", "samples.parquet"])
def test_lost_files_of_a_complete_data_set_are_written_again(tmp_path, job, name, damage):
    coco = CocoSet(tmp_path)
    coco.instances[0]["segmentation"] = None  # was left out with --skip-bad, and is not refused now
    problems = job(coco).problems
    folder = tmp_path / "shards"
    files = [folder / file for file in ("dataset.json", "samples.parquet", "shards/00000.tar")]
    before = {path: path.read_bytes() for path in files}
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"short")
    report = job(coco, skip_bad=False)
    assert report.written_shards == (name == "shards/00000.tar")
    assert f"missing or damaged: 1 file ({name}); written again" in report.summary()
    assert report.problems == problems
    assert {path: path.read_bytes() for path in before} == before
    assert job(coco, skip_bad=False).notes == ()


def test_lost_shard_whose_content_differs_now_replaces_the_manifest(tmp_path, job):
    coco = CocoSet(tmp_path)
    job(coco)
    folder = tmp_path / "shards"
    first = Manifest.load(str(folder), Storage()).fingerprint
    shutil.rmtree(folder / "sources")  # as for shards of versions that did not record source files
    (folder / "shards" / "00000.tar").unlink()
    coco.files["a.jpg"] = b"no image"
    with pytest.raises(DataError, match="1 of 1 sample cannot be used, so the data set is not committed"):
        job(coco, skip_bad=False)
    assert not (folder / "dataset.json").exists()
    coco.files["a.jpg"] = CocoSet(tmp_path).files["a.jpg"] + b"\0"
    assert job(coco, skip_bad=False).committed
    assert Manifest.load(str(folder), Storage()).fingerprint != first


def test_lost_shard_without_its_source_files_is_refused(tmp_path, job):
    coco = CocoSet(tmp_path)
    job(coco)
    (tmp_path / "shards" / "shards" / "00000.tar").unlink()
    coco.files.clear()
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 source file of the shards to be written again cannot be read .*a\.jpg"):
        job(coco)


def test_images_that_max_pixels_now_permits_are_added(tmp_path):
    coco = CocoSet(tmp_path)
    coco.images.append({**coco.images[0], "id": 41, "file_name": "b.png", "width": 2 * W})
    coco.files["b.png"] = encode_png(np.zeros((H, 2 * W, 3), np.uint8))
    coco.write()
    dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source, max_pixels=H * W)

    def shard(max_pixels, **options):
        return run_shard_job("train", replace(dataset, max_pixels=max_pixels), ClusterConfig(), Storage(), **options)

    assert len(shard(H * W, skip_bad=True).problems) == 1
    assert shard(2 * H * W - 1).written_shards == 0
    assert Manifest.load(dataset.shards, Storage()).num_samples == 1
    report = shard(2 * H * W)
    assert "max_pixels now permits images that were left out; rewritten: 1 shard" in report.summary()
    assert report.problems == ()
    assert Manifest.load(dataset.shards, Storage()).num_samples == 2
    assert shard(2 * H * W).written_shards == 0


@pytest.mark.parametrize("reason", ["max_pixels", "changed image", "lost shard"])
def test_rewritten_data_set_may_leave_out_what_it_left_out_before(tmp_path, reason):
    coco = CocoSet(tmp_path)
    for number in (1, 2):
        coco.images.append({**coco.images[0], "id": 40 + number, "file_name": f"{number}.png", "width": number * W})
    coco.files |= {"1.png": b"no image", "2.png": encode_png(np.zeros((H, 2 * W, 3), np.uint8))}
    coco.instances[0]["segmentation"] = None
    coco.write()
    dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source, max_pixels=H * W)
    left_out = run_shard_job("train", dataset, ClusterConfig(), Storage(), skip_bad=True).problems
    assert {(problem.key, problem.is_in_shard) for problem in left_out} == {("a", True), ("1", False), ("2", False)}
    match reason:
        case "max_pixels":
            dataset = replace(dataset, max_pixels=2 * H * W)
        case "changed image":
            coco.files["a.jpg"] += b"\0"
        case _:
            shutil.rmtree(tmp_path / "shards" / "sources")
            (tmp_path / "shards" / "shards" / "00000.tar").unlink()
            coco.files["a.jpg"] += b"\0"
    coco.write()
    report = run_shard_job("train", dataset, ClusterConfig(), Storage())
    assert (report.written_shards, report.committed) == (1, True)
    assert {problem.key for problem in report.problems} == {"a", "1"} | ({"2"} if reason != "max_pixels" else set())
    coco.files["a.jpg"] = b"no image"
    coco.write()
    with pytest.raises(DataError, match=r"a\.jpg(.|\n)*cannot be used, so the data set is not committed"):
        run_shard_job("train", dataset, ClusterConfig(), Storage())


@pytest.mark.parametrize(
    ("num_annotations", "num_samples", "words"),
    [(0, 2, "2 of 9 samples"), (3, 0, "3 annotations"), (3, 2, "3 annotations and 2 of 9 samples")],
)
def test_count_problems_describes_annotations_and_samples(num_annotations, num_samples, words):
    problems = [
        SampleProblem("a", "images/a.jpg", "images/a.jpg: annotation 2 ...", is_in_shard=True)
    ] * num_annotations
    problems += [SampleProblem("b", "images/b.jpg", "/x/images/b.jpg: ...")] * num_samples
    assert count_problems(problems, 9) == words
    assert {problem.line for problem in problems} <= {
        "images/a.jpg: annotation 2 ...",
        "images/b.jpg: /x/images/b.jpg: ...",
    }
