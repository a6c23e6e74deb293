from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from m2f.data_pipeline.config import DatasetConfig, StorageConfig
from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import commit_manifest, complete_parts, plan_shards, write_dataset, write_shard
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage, join

SOURCE = SyntheticSource(num_images=14, seed=2)
STORAGE = Storage()


@pytest.fixture(scope="module")
def reader():
    return open_reader(SOURCE)


def _config(folder, **changes):
    return DatasetConfig(shards=str(folder), source=SOURCE, shard_mb=0.065, **changes)


def _plan(reader, folder, **changes):
    return plan_shards(reader, _config(folder, **changes), source_fingerprint(SOURCE))


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob("shards/*.tar"))}


@dataclass(frozen=True)
class _DamagedReader:
    """Reader that raises DataError for the keys in `bad`."""

    reader: object
    bad: frozenset

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def read(self, index):
        if self.reader.keys[index] in self.bad:
            raise DataError(f"{self.reader.source(index)}: the JPEG file is truncated")
        return self.reader.read(index)


class _CountingReader(_DamagedReader):
    reads = 0

    def read(self, index):
        type(self).reads += 1
        return super().read(index)


@pytest.fixture(scope="module")
def dataset(reader, tmp_path_factory):
    """Return a committed data set, which tests must not change."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(reader, _config(folder), STORAGE)


def test_the_plan_is_a_seeded_permutation(reader, tmp_path):
    plan = _plan(reader, tmp_path)
    keys = [key for row in plan.shard_keys for key in row]
    assert len(plan.shard_keys) == 4
    assert sorted(keys) == sorted(reader.keys)
    assert keys != list(reader.keys)
    assert plan.num_samples == 14
    assert max(map(len, plan.shard_keys)) - min(map(len, plan.shard_keys)) <= 1
    assert _plan(reader, tmp_path).hash == plan.hash
    assert _plan(reader, tmp_path / "elsewhere").hash == plan.hash
    others = [
        _plan(reader, tmp_path, seed=1),
        plan_shards(reader, replace(_config(tmp_path), shard_mb=9.0), source_fingerprint(SOURCE)),
        plan_shards(reader, _config(tmp_path), "other"),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 4
    assert len(others[1].shard_keys) == 1


def test_a_source_without_samples_is_refused(reader, tmp_path):
    with pytest.raises(DataError, match="contains no sample"):
        plan_shards(reader.subset([]), _config(tmp_path), "")
    with pytest.raises(DataError, match=r"no source to shard; set datasets\.<name>\.source"):
        write_dataset(reader, replace(_config(tmp_path), source=None), STORAGE)


def test_every_sample_is_read_back_unchanged(reader, dataset):
    assert sorted(dataset.key) == sorted(reader.keys)
    positions = {key: i for i, key in enumerate(reader.keys)}
    for index, key in enumerate(dataset.key):
        sample, original = dataset.read_sample(index, STORAGE), reader.read(positions[key])
        assert sample.key == key
        assert sample.image_id == dataset.image_id[index] == original.image_id
        assert np.array_equal(sample.annotation.seg, original.annotation.seg)
        assert sample.annotation.segments == original.annotation.segments
        assert dataset.read_members(index, STORAGE)["img.jpg"] == original.image


def test_stock_tools_read_the_shards(dataset):
    order = iter(range(dataset.num_samples))
    for shard in range(len(dataset.shards)):
        path = dataset.shard_url(shard)
        names = subprocess.run(["tar", "tf", path], check=True, capture_output=True, text=True).stdout.split()
        with tarfile.open(path) as tar:
            assert [m.name for m in tar] == names
        for raw in webdataset.WebDataset(path, shardshuffle=False):
            index = next(order)
            assert raw["__key__"] == dataset.key[index]
            members = {name: data for name, data in raw.items() if not name.startswith("__")}
            assert members == dataset.read_members(index, STORAGE)
            assert json.loads(members["json"])["key"] == raw["__key__"]
    assert next(order, None) is None


def test_tars_are_byte_identical_across_writers(reader, dataset, tmp_path):
    plan = _plan(reader, tmp_path)
    for index in reversed(
        range(len(plan.shard_keys))
    ):  # as on other machines: another order, only the samples of the shard, pickled
        keys = set(plan.shard_keys[index])
        part = reader.subset([i for i, key in enumerate(reader.keys) if key in keys])
        write_shard(pickle.loads(pickle.dumps(part)), pickle.loads(pickle.dumps(plan)), index, Storage())
    again = commit_manifest(plan, complete_parts(plan, STORAGE), STORAGE)
    assert _digests(tmp_path) == _digests(dataset.url)
    assert again.fingerprint == dataset.fingerprint
    assert (tmp_path / "samples.parquet").read_bytes() == Path(dataset.url, "samples.parquet").read_bytes()


def test_an_interrupted_run_is_resumed(reader, dataset, tmp_path):
    plan = _plan(reader, tmp_path)
    write_shard(reader, plan, 0, STORAGE)
    write_shard(reader, plan, 2, STORAGE)
    Path(tmp_path, "shards", "00001.tar").write_bytes(b"half a sha")  # a writer was killed before it wrote the receipt
    with pytest.raises(DataError, match=r"2 of 4 shards are not written yet: \[1, 3\]"):
        commit_manifest(plan, complete_parts(plan, STORAGE), STORAGE)
    assert not (tmp_path / "dataset.json").exists()
    counting = _CountingReader(reader, frozenset())
    written_indices = []
    write_dataset(counting, _config(tmp_path), STORAGE, progress=lambda part: written_indices.append(part.index))
    assert _CountingReader.reads == len(plan.shard_keys[1]) + len(plan.shard_keys[3])
    assert written_indices == [0, 1, 2, 3]
    assert _digests(tmp_path) == _digests(dataset.url)


def test_lost_or_damaged_parts_are_written_again(reader, tmp_path):
    plan = _plan(reader, tmp_path)
    for index in range(4):
        write_shard(reader, plan, index, STORAGE)
    assert [part.index for part in complete_parts(plan, STORAGE)] == [0, 1, 2, 3]
    (tmp_path / "shards" / "00000.tar").unlink()
    (tmp_path / "shards" / "00001.tar").write_bytes(b"short")
    (tmp_path / "parts" / "00002.parquet").write_bytes(b"no parquet")
    assert [part.index for part in complete_parts(plan, STORAGE)] == [3]


def test_parts_of_another_encoding_version_are_written_again(reader, tmp_path, monkeypatch):
    plan = _plan(reader, tmp_path)
    for index in range(4):
        write_shard(reader, plan, index, STORAGE)
    assert len(complete_parts(plan, STORAGE)) == 4
    monkeypatch.setattr(codec, "VERSION", codec.VERSION + 1)
    assert complete_parts(plan, STORAGE) == ()
    monkeypatch.undo()
    commit_manifest(plan, complete_parts(plan, STORAGE), STORAGE)
    monkeypatch.setattr(codec, "VERSION", codec.VERSION + 1)
    assert len(complete_parts(plan, STORAGE)) == 4, "what is committed stays as it is"


def test_a_second_run_changes_nothing(reader, dataset):
    before = {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*") if p.is_file()}
    again = write_dataset(reader, _config(dataset.url), STORAGE)
    assert again.fingerprint == dataset.fingerprint
    assert {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*") if p.is_file()} == before


def test_lost_shard_that_is_written_in_another_encoding_replaces_the_manifest(reader, dataset, tmp_path, monkeypatch):
    write_dataset(reader, _config(tmp_path), STORAGE)
    (tmp_path / "shards" / "00001.tar").unlink()
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda sample: [*encode(sample), (f"{sample.key}.zzz", b"new")])
    assert write_dataset(reader, _config(tmp_path), STORAGE).fingerprint != dataset.fingerprint
    Manifest.load(str(tmp_path), STORAGE).check_shards(STORAGE)


def test_another_plan_in_the_same_folder_is_refused(reader, dataset, tmp_path):
    with pytest.raises(DataError, match=r"belongs to another shard plan.*choose another folder"):
        write_dataset(reader, _config(dataset.url, seed=9), STORAGE)
    plan = _plan(reader, tmp_path)
    complete_parts(plan, STORAGE)  # claims the folder before a shard is written
    with pytest.raises(DataError, match="belongs to another shard plan"):
        write_dataset(reader, _config(tmp_path, seed=9), STORAGE)


def test_data_set_without_a_plan_file_is_not_replaced(reader, dataset, tmp_path):
    (tmp_path / "dataset.json").write_bytes(Path(dataset.url, "dataset.json").read_bytes())
    with pytest.raises(DataError, match="belongs to another shard plan"):
        complete_parts(_plan(reader, tmp_path, seed=5), STORAGE)


def test_small_changes_in_size_do_not_change_the_plan(reader, tmp_path):
    class Grown(_DamagedReader):
        def size_hint(self, index):
            return int(self.reader.size_hint(index) * 1.02)

    config = replace(_config(tmp_path), shard_mb=0.036)
    assert plan_shards(Grown(reader, frozenset()), config, "").hash == plan_shards(reader, config, "").hash


def test_unexpected_errors_name_the_sample(reader, tmp_path):
    class Broken(_DamagedReader):
        def read(self, index):
            raise MemoryError

    with pytest.raises(MemoryError) as caught:
        write_shard(Broken(reader, frozenset()), _plan(reader, tmp_path), 0, STORAGE)
    assert caught.value.__notes__[0].startswith("while writing sample 'synthetic-2-")


def test_commit_refuses_to_replace_another_data_set(reader, dataset, tmp_path):
    plan = _plan(reader, tmp_path, seed=5)
    parts = [write_shard(reader, plan, index, STORAGE) for index in range(4)]
    (tmp_path / "dataset.json").write_bytes(Path(dataset.url, "dataset.json").read_bytes())
    with pytest.raises(DataError, match="already contains another data set"):
        commit_manifest(plan, parts, STORAGE)


def test_bad_samples_are_not_written_to_shards(reader, tmp_path):
    bad = frozenset(reader.keys[i] for i in (3, 8))
    damaged = _DamagedReader(reader, bad)
    with pytest.raises(DataError, match=r"2 of 14 samples cannot be used(.|\n)*000003.jpg: the JPEG file is truncated"):
        write_dataset(damaged, _config(tmp_path), STORAGE)
    assert not (tmp_path / "dataset.json").exists()
    plan = _plan(reader, tmp_path)
    problems = [p for i in range(4) for p in write_shard(damaged, plan, i, STORAGE).problems]
    assert {(p.key, p.source) for p in problems} == {(key, f"images/{key}.jpg") for key in bad}
    parts = complete_parts(plan, STORAGE)
    assert all(not part.problems for part in parts)  # parts with problems are written again

    accepted = write_dataset(damaged, _config(tmp_path), STORAGE, skip_bad=True)
    assert sorted(accepted.key) == sorted(set(reader.keys) - bad)
    for index in range(accepted.num_samples):
        accepted.read_sample(index, STORAGE)
    # After the source is corrected, the committed data set must not change, because others may be reading it.
    assert write_dataset(reader, _config(tmp_path), STORAGE).fingerprint == accepted.fingerprint
    assert Manifest.load(str(tmp_path), STORAGE).read_sample(0, STORAGE).key == accepted.key[0]


def test_a_corrected_source_completes_the_data_set(reader, dataset, tmp_path):
    with pytest.raises(DataError, match="1 of 14"):
        write_dataset(_DamagedReader(reader, frozenset(reader.keys[:1])), _config(tmp_path), STORAGE)
    assert write_dataset(reader, _config(tmp_path), STORAGE).fingerprint == dataset.fingerprint


def test_shards_without_a_good_sample_are_left_out(reader, tmp_path):
    plan = _plan(reader, tmp_path)
    manifest = write_dataset(
        _DamagedReader(reader, frozenset(plan.shard_keys[1])), _config(tmp_path), STORAGE, skip_bad=True
    )
    assert [shard.name for shard in manifest.shards] == [f"shards/0000{i}.tar" for i in (0, 2, 3)]
    assert manifest.read_sample(manifest.num_samples - 1, STORAGE).key == plan.shard_keys[3][-1]
    with pytest.raises(DataError, match="none of the samples"):
        write_dataset(
            _DamagedReader(reader, frozenset(reader.keys)), _config(tmp_path / "none"), STORAGE, skip_bad=True
        )


def test_source_that_changed_after_planning_is_refused(reader, tmp_path):
    plan = _plan(reader, tmp_path)
    with pytest.raises(DataError, match="it changed while shards were being written"):
        write_shard(reader.subset([0]), plan, 0, STORAGE)


def test_store_that_returns_other_bytes_raises_error(reader, tmp_path, monkeypatch):
    storage = Storage()
    monkeypatch.setattr(storage, "get", lambda url: b"other")
    with pytest.raises(StorageError, match=r"00000.tar: the store returned different bytes"):
        write_shard(reader, _plan(reader, tmp_path), 0, storage)
    assert not (tmp_path / "parts").exists()


def test_data_set_in_s3_equals_the_local_one(reader, dataset, s3_endpoint):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint))
    config = _config("s3://box/some/where")
    manifest = write_dataset(reader, config, storage)
    assert manifest.fingerprint == dataset.fingerprint
    assert write_dataset(reader, config, storage).fingerprint == dataset.fingerprint
    with pytest.raises(DataError, match="belongs to another shard plan"):
        write_dataset(reader, replace(config, seed=9), storage)
    assert hashlib.sha256(storage.get(manifest.shard_url(1))).hexdigest() == manifest.shards[1].sha256
    loaded = Manifest.load(config.shards, storage)
    for index in (0, 7, 13):
        assert loaded.read_members(index, storage) == dataset.read_members(index, STORAGE)
        assert codec.decode(loaded.read_members(index, storage)).key == dataset.key[index]
    assert join(config.shards, "dataset.json") in storage.list(config.shards)
