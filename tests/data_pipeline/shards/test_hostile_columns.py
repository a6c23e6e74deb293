"""`m2f verify` reports a hostile samples.parquet, and its memory is bounded."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

MAIN = Path(__file__).with_name("hostile_manifest_main.py")
SOURCE = SyntheticSource(num_images=3)
MAX_MB = 150


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_dataset(open_reader(SOURCE), DatasetConfig(shards=str(folder), source=SOURCE), Storage())
    return folder


def write_forged(dataset_folder, target, table):
    """Write a manifest with this table of samples and a matching checksum."""
    target.mkdir()
    pq.write_table(table, target / "samples.parquet", compression="zstd")
    return write_document(dataset_folder, target)


def write_document(dataset_folder, target):
    document = json.loads((dataset_folder / "dataset.json").read_text())
    document["samples"]["sha256"] = hashlib.sha256((target / "samples.parquet").read_bytes()).hexdigest()
    (target / "dataset.json").write_text(json.dumps(document))
    (target / "shards").symlink_to(dataset_folder / "shards")
    return target


def verify(folder):
    """Return the output of `m2f verify` in a separate process; check that it fails in less than MAX_MB."""
    process = subprocess.run([sys.executable, MAIN, folder], capture_output=True, text=True, check=True)
    result = json.loads(process.stdout)
    assert result["status"] == 1
    assert result["mb"] < MAX_MB
    return result["output"]


def with_column(table, name, values):
    index = SAMPLE_SCHEMA.get_field_index(name)
    return table.set_column(index, SAMPLE_SCHEMA.field(name), pa.array(values, SAMPLE_SCHEMA.field(name).type))


@pytest.mark.parametrize("name", ["member_offsets", "member_lengths", "category_counts", "category_pixels"])
def test_lists_of_unequal_lengths_are_refused(dataset_folder, tmp_path, name):
    table = pq.read_table(dataset_folder / "samples.parquet")
    lists = table.column(name).to_pylist()
    output = verify(write_forged(dataset_folder, tmp_path / "a", with_column(table, name, [lists[0][:-1], *lists[1:]])))
    assert f"the lists of {name} differ in length" in output


def test_null_row_in_a_list_column_is_refused(dataset_folder, tmp_path):
    table = pq.read_table(dataset_folder / "samples.parquet")
    lists = table.column("member_lengths").to_pylist()
    output = verify(
        write_forged(dataset_folder, tmp_path / "a", with_column(table, "member_lengths", [None, *lists[1:]]))
    )
    assert "differ in length" in output


def test_many_rows_in_few_bytes_are_refused_before_decoding(dataset_folder, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    rows = pq.read_table(dataset_folder / "samples.parquet").slice(0, 1)
    batch = pa.Table.from_batches(rows.take(pa.array(np.zeros(1_000_000, np.int64))).to_batches(), rows.schema)
    with pq.ParquetWriter(folder / "samples.parquet", rows.schema, compression="zstd") as writer:
        for _ in range(8):
            writer.write_table(batch)
    size = (folder / "samples.parquet").stat().st_size
    assert size < 2_000_000
    assert "bytes decode to 8000000 rows" in verify(write_document(dataset_folder, folder))


def test_long_lists_in_few_bytes_are_refused_before_decoding(dataset_folder, tmp_path):
    table = pq.read_table(dataset_folder / "samples.parquet")
    lists = pa.ListArray.from_arrays(
        pa.array([0, 0, 0, 20_000_000], pa.int32()), pa.array(np.ones(20_000_000, np.int32))
    )
    index = SAMPLE_SCHEMA.get_field_index("category_ids")
    output = verify(
        write_forged(dataset_folder, tmp_path / "a", table.set_column(index, SAMPLE_SCHEMA.field(index), lists))
    )
    assert "bytes decode to 3 rows, with more than" in output


@pytest.mark.parametrize("name", ["key", "member_names"])
def test_long_texts_in_few_bytes_are_refused_before_decoding(dataset_folder, tmp_path, name):
    table = pq.read_table(dataset_folder / "samples.parquet")
    text = "x" * 100_000_000
    values = [text] * 3 if name == "key" else [[text] * len(names) for names in table.column(name).to_pylist()]
    assert "more than 100 times as many" in verify(
        write_forged(dataset_folder, tmp_path / "a", with_column(table, name, values))
    )


def test_long_dictionary_encoded_key_is_refused(dataset_folder, tmp_path):
    rows = pq.read_table(dataset_folder / "samples.parquet").take(pa.array(np.zeros(4000, np.int64)))
    output = verify(write_forged(dataset_folder, tmp_path / "a", with_column(rows, "key", ["x" * 500_000] * 4000)))
    assert "key contains texts of more than 4000 bytes" in output


@pytest.mark.parametrize("cut", [slice(0, 100), slice(200, None), slice(0, -1)])
def test_damaged_files_raise_data_error(dataset_folder, tmp_path, cut):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "samples.parquet").write_bytes((dataset_folder / "samples.parquet").read_bytes()[cut])
    with pytest.raises(DataError, match="have invalid content"):
        Manifest.load(str(write_document(dataset_folder, folder)), Storage())


def test_damaged_pages_load_or_raise_data_error(dataset_folder, tmp_path):
    data = (dataset_folder / "samples.parquet").read_bytes()
    for number, start in enumerate(range(4, len(data) - 3000, 400)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "samples.parquet").write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
        write_document(dataset_folder, folder)
        try:
            manifest = Manifest.load(str(folder), Storage())
            assert len(manifest.key) == len(manifest.category_ids.offsets) - 1 == 3
            manifest.statistics()
        except DataError:
            continue
