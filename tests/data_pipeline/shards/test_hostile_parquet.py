"""Hostile Parquet files other than samples.parquet: every reader refuses them in bounded memory."""

import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import LabelMapSource
from m2f.data_pipeline.storage.bounded_parquet import read_bounded_table
from m2f.data_pipeline.storage.ragged_table import Ragged, read_table_bytes, table_bytes
from m2f.data_pipeline.storage.storage import Storage

MAIN = Path(__file__).with_name("hostile_parquet_main.py")
MAX_MB = 150
ROWS, BATCH_ROWS = 30_000_000, 1_000_000


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three images in one shard, without a committed manifest."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        for i in range(3):
            shape = (24, 32, 3) if name == "images" else (24, 32)
            assert cv2.imwrite(str(tmp_path / name / f"{i}.png"), np.full(shape, i % 2, np.uint8))
    classes = [{"label": i, "name": name, "isthing": 0} for i, name in enumerate(("sky", "road"))]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    source = LabelMapSource(
        images=f"{tmp_path}/images", labels=f"{tmp_path}/labels", categories=f"{tmp_path}/classes.json"
    )
    write_dataset(open_reader(source), DatasetConfig(shards=f"{tmp_path}/shards", source=source), Storage())
    (tmp_path / "shards/dataset.json").unlink()
    return tmp_path


def run_reader(name, folder):
    """Return the result of a reader in a separate process; check that it takes less than MAX_MB."""
    process = subprocess.run([sys.executable, MAIN, name, folder], capture_output=True, text=True, check=True)
    result = json.loads(process.stdout)
    assert result["mb"] < MAX_MB
    return result["output"]


def write_repeated(table, path, times, batch_rows=BATCH_ROWS):
    """Write a small file that repeats the first row of a table `times` times."""
    rows = table.slice(0, 1).take(pa.array(np.zeros(batch_rows, np.int64))).combine_chunks()
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for _ in range(times // batch_rows):
            writer.write_table(rows)
    assert path.stat().st_size < 2_000_000


def test_image_records_that_decode_to_too_many_rows_are_refused(tmp_path):
    write_repeated(pa.table({"image_id": [7], "PQ": [0.5]}), tmp_path / "file.parquet", ROWS)
    assert "bytes decode to 30000000 rows" in run_reader("images", tmp_path)


def test_receipts_that_decode_to_too_many_rows_are_ignored(folder):
    assert run_reader("parts", folder) == "1 parts"
    path = folder / "shards/parts/00000.parquet"
    table = pq.read_table(path)
    write_repeated(table.select(["offset", "length"]).replace_schema_metadata(table.schema.metadata), path, ROWS)
    assert run_reader("parts", folder) == "0 parts"


@pytest.mark.parametrize("times", [ROWS, BATCH_ROWS // 2])
def test_source_records_that_decode_to_too_many_rows_are_ignored(folder, times):
    assert run_reader("records", folder) == "1 records"
    path = folder / "shards/sources/00000.parquet"
    write_repeated(pq.read_table(path), path, times, BATCH_ROWS // 2)
    assert run_reader("records", folder) == "0 records"


def test_source_record_with_invalid_file_numbers_is_ignored(folder):
    path = folder / "shards/sources/00000.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index("number")
    numbers = pa.array(np.arange(len(table), dtype=np.int32) + 40)
    pq.write_table(table.set_column(index, table.schema.field(index), numbers), path)
    assert run_reader("records", folder) == "0 records"


def parquet(table, **settings):
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, **{"compression": "zstd", **settings})
    return buffer.getvalue()


LONG = "x" * 1_000_000
HOSTILE = {
    "a long text behind short codes": (lambda: parquet({"a": [LONG] * 500}), "texts of more than 100 times as many"),
    "the same in lists": (lambda: parquet({"a": [[LONG]] * 500}), "texts of more than 100 times as many"),
    "bytes in structures": (
        lambda: parquet({"a": [{"b": LONG.encode()}] * 500}),
        "texts of more than 100 times as many",
    ),
    "a long text": (lambda: parquet({"a": [LONG * 20]}, use_dictionary=False), "more than 100 times as many"),
    "long values of one length": (
        lambda: parquet({"a": pa.array([b"x" * 9000], pa.binary(9000))}),
        "has 9000 bytes, more than",
    ),
    "differences": (
        lambda: parquet({"a": [LONG] * 500}, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY"),
        "a has the unsupported encodings",
    ),
    "many columns": (
        lambda: parquet({f"{i}": np.zeros(900_000, np.int8) for i in range(5)}),
        "4500000 values in total",
    ),
    "texts in maps": (
        lambda: parquet({"a": pa.array([[(1, LONG)]] * 500, pa.map_(pa.int32(), pa.string()))}),
        r"a column has texts in a map<",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_that_decode_to_far_more_bytes_are_refused(name):
    make_data, message = HOSTILE[name]
    with pytest.raises(DataError, match=message):
        read_table_bytes(make_data())


def test_own_tables_are_read_unchanged():
    """Genuine records of 500 images: distinct scores compress badly, constant flags extremely well."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 200, 500)
    columns = {
        "image_id": np.arange(500),
        "name": np.array([f"image {i}" for i in range(500)], dtype=object),
        "PQ": np.where(np.arange(500) % 3 == 0, np.nan, 0.5),
        "score": Ragged(random.random(counts.sum()), counts),
        "crowd": Ragged(np.zeros(counts.sum(), bool), counts),
    }
    decoded = read_table_bytes(table_bytes(columns))
    assert decoded.keys() == columns.keys()
    for name in ("score", "crowd"):
        assert np.array_equal(decoded[name].values, columns[name].values)
        assert np.array_equal(decoded[name].counts, columns[name].counts)
    assert np.array_equal(decoded["PQ"], columns["PQ"], equal_nan=True)
    assert decoded["name"].tolist() == columns["name"].tolist()


def test_texts_and_nulls_are_read_unchanged(tmp_path):
    table = pa.table({"a": [["x"], [], None, ["y", "z"]], "b": ["u", None, "v", "w"], "c": pa.nulls(4, pa.string())})
    assert read_bounded_table(parquet(table)).equals(table)
