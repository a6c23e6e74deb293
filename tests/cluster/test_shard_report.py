"""The report of a sharding job, without Ray: what it counts, and that it is there when every sample is bad."""

import json
from contextlib import nullcontext

import pytest

from m2f.cluster import shard_job
from m2f.cluster.recipe.config import ClusterConfig
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.shards.write import write_shard
from m2f.data_pipeline.storage.storage import Storage
from tests.data_pipeline.coco_set import CocoSet


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Shards a COCO set in this process; returns the report as it is stored."""
    monkeypatch.setattr(shard_job, "local_or_existing", lambda *_: nullcontext())
    monkeypatch.setattr(
        shard_job,
        "_write_shards",
        lambda reader, plan, missing, storage, *_: (write_shard(reader, plan, i, storage) for i in missing),
    )

    def run(coco):
        coco.write()
        dataset = DatasetConfig(shards=str(tmp_path / "shards"), source=coco.instances_source)
        return shard_job.run_shard_job("train", dataset, ClusterConfig(), Storage(), skip_bad=True)

    return run


def test_the_report_is_written_when_every_sample_is_bad(tmp_path, job):
    coco = CocoSet(tmp_path)
    coco.files["a.jpg"] = b"no image"
    with pytest.raises(DataError, match="not one sample of the source can be used"):
        job(coco)
    report = json.loads((tmp_path / "shards" / "report.json").read_text())
    assert not report["committed"]
    assert [problem["is_in_shard"] for problem in report["problems"]] == [False]


def test_a_bad_annotation_and_a_numbered_one_are_counted_and_remembered(tmp_path, job):
    coco = CocoSet(tmp_path)
    coco.instances[0]["segmentation"] = None
    coco.instances[1]["id"] = "two"
    report = job(coco)
    assert "train: 1 samples in 1 shards" in report.summary()
    assert "annotation 1 has no usable" in report.summary()
    assert "1 annotations with a missing" in report.summary()
    again = job(coco)
    assert (again.problems, again.repairs) == (report.problems, report.repairs)
