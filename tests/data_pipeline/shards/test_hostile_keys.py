"""Names in shards and manifests that would escape a folder are refused by every reader."""

import dataclasses
import hashlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards import codec
from m2f.data_pipeline.shards.index import IndexOptions, index_tars
from m2f.data_pipeline.shards.manifest import Manifest, write_table
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

STORAGE = Storage()
SOURCE = SyntheticSource(num_images=3)
INVALID_KEYS = ("../../x", "/x", "a/../../x", "..", "a\\x", "a\x1b[2Jx", "a\x00", "")


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(open_reader(SOURCE), DatasetConfig(shards=str(tmp_path / "set"), source=SOURCE), STORAGE)


def with_key(members, key):
    """Return the members of a sample with another key in its JSON."""
    return members | {"json": json.dumps(json.loads(members["json"]) | {"key": key}).encode()}


@pytest.mark.parametrize("key", INVALID_KEYS)
def test_index_refuses_an_invalid_key_in_a_json_member(tmp_path, dataset, key):
    tar = tmp_path / "foreign.tar"
    with tarfile.open(tar, "w") as archive:
        for index, name in enumerate(dataset.key):
            members = dataset.read_members(index, STORAGE)
            for extension, data in (with_key(members, key) if index == 1 else members).items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    options = IndexOptions(categories=dataset.categories, labels=None, max_pixels=10_000_000)
    report = index_tars([str(tar)], str(tmp_path / "indexed"), "m2f", options, STORAGE, skip_bad=True)
    (fault,) = report.faults
    assert "the name" in fault.problem
    assert Manifest.load(str(tmp_path / "indexed"), STORAGE).key.tolist() == [dataset.key[0], dataset.key[2]]


@pytest.mark.parametrize("key", INVALID_KEYS)
def test_sample_with_an_invalid_key_is_not_decoded(dataset, key):
    members = dataset.read_members(0, STORAGE)
    assert codec.decode(members).key == dataset.key[0]
    with pytest.raises(DataError, match=r"^the json member of a sample: the name"):
        codec.decode(with_key(members, key))


@pytest.mark.parametrize("key", INVALID_KEYS)
def test_manifest_with_an_invalid_key_is_refused(tmp_path, dataset, key):
    table = pq.read_table(tmp_path / "set/samples.parquet")
    keys = pa.array([key, *dataset.key[1:]])
    rewrite_manifest(tmp_path / "set", table.set_column(0, "key", keys))
    with pytest.raises(DataError, match=r"samples.parquet: the name .* rename it"):
        Manifest.load(str(tmp_path / "set"), STORAGE).key  # noqa: B018


@pytest.mark.parametrize("name", ["../../secret.tar", "shards/../../x.tar", "shards\\x.tar"])
def test_manifest_with_a_shard_outside_its_folder_is_refused(tmp_path, dataset, name):
    rewrite_manifest(tmp_path / "set", shard={"name": name})
    with pytest.raises(DataError, match=r"^[^ ]*dataset.json: the name .* rename it"):
        Manifest.load(str(tmp_path / "set"), STORAGE)


def test_manifest_with_a_path_as_checksum_is_refused(tmp_path, dataset):
    rewrite_manifest(tmp_path / "set", shard={"sha256": "../../../x"})
    with pytest.raises(DataError, match="have invalid content"):
        Manifest.load(str(tmp_path / "set"), STORAGE)


def test_shards_elsewhere_keep_their_full_url(tmp_path, dataset):
    (shard,) = dataset.shards
    rewrite_manifest(tmp_path / "set", shard=dataclasses.asdict(shard) | {"name": "s3://bucket/00000.tar"})
    assert Manifest.load(str(tmp_path / "set"), STORAGE).shard_url(0) == "s3://bucket/00000.tar"


def rewrite_manifest(folder, table=None, shard=None):
    """Replace the table of samples, or fields of the first shard; the checksums match."""
    document = json.loads((folder / "dataset.json").read_bytes())
    if table is not None:
        data = write_table(table)
        (folder / "samples.parquet").write_bytes(data)
        document["samples"] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if shard is not None:
        document["shards"][0] |= shard
    (folder / "dataset.json").write_text(json.dumps(document))
