from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards import manifest as manifest_module
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA, Columns
from m2f.data_pipeline.shards.manifest import Manifest, Ragged, ShardInfo
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

STORAGE = Storage()
SOURCE = SyntheticSource(num_images=10, seed=6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    config = DatasetConfig(shards=str(folder), source=SOURCE, shard_mb=0.1)
    return write_dataset(open_reader(SOURCE), config, STORAGE)


@pytest.fixture
def copy(dataset, tmp_path):
    """Return a copy of the data set that a test may damage."""
    shutil.copytree(dataset.url, tmp_path / "copy")
    return tmp_path / "copy"


def test_columns_describe_the_samples(dataset):
    samples = {sample.key: sample for sample in map(open_reader(SOURCE).read, range(10))}
    assert dataset.num_samples == 10
    assert dataset.shard.tolist() == sorted(dataset.shard.tolist())
    for index, key in enumerate(dataset.key):
        sample = samples[key]
        assert (dataset.height[index], dataset.width[index]) == (sample.height, sample.width)
        assert dataset.image_id[index] == sample.image_id
        things = [s for s in sample.annotation.segments if s.map == "inst"]
        stuff = [s for s in sample.annotation.segments if not s.is_thing]
        segments = things + stuff
        ids = sorted({s.category_id for s in segments})
        assert dataset.num_segments[index] == len(segments)
        assert dataset.category_ids[index].tolist() == ids
        assert dataset.category_counts[index].tolist() == [sum(s.category_id == i for s in segments) for i in ids]
        assert dataset.category_areas[index].tolist() == [
            sum(s.area for s in segments if s.category_id == i) for i in ids
        ]


def test_samples_fill_their_shards(dataset):
    for shard, info in enumerate(dataset.shards):
        rows = np.flatnonzero(dataset.shard == shard)
        assert len(rows) == info.num_samples
        starts = [0, *np.cumsum(dataset.length[rows])]
        assert dataset.offset[rows].tolist() == starts[:-1]
        assert starts[-1] <= info.size == Path(dataset.shard_url(shard)).stat().st_size


def test_statistics_count_images_segments_and_pixels(dataset):
    totals = {statistics.category.name: statistics for statistics in dataset.statistics()}
    assert list(totals) == [category.name for category in dataset.categories.categories]
    assert sum(s.num_segments for s in totals.values()) == dataset.num_segments.sum()
    assert sum(s.num_pixels for s in totals.values()) == (dataset.height.astype(int) * dataset.width).sum()
    assert sum(s.num_images for s in totals.values()) == len(dataset.category_ids.values)


def test_a_manifest_can_be_pickled(dataset):
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read_sample(3, STORAGE).key == dataset.key[3]


def test_ragged_rows_give_the_row_of_every_value(dataset):
    rows = dataset.category_ids.rows()
    assert rows.tolist() == [i for i in range(10) for _ in dataset.category_ids[i]]


def test_ragged_any_finds_rows_with_a_flag():
    ragged = Ragged(np.arange(5), np.array([0, 0, 2, 2, 3, 5, 5]))
    assert ragged.any(np.array([0, 1, 0, 0, 1], bool)).tolist() == [False, True, False, False, True, False]
    assert Ragged(np.zeros(0, int), np.zeros(3, int)).any(np.zeros(0, bool)).tolist() == [False, False]


def test_list_columns_use_the_narrowest_integer_type():
    """The rows exceed one decoding batch, and later batches need a wider type."""
    rows = [[1, 250]] * 5000 + [[]] * 5000 + [[-3, 30_000]] * 5000
    empty = {name: pa.nulls(len(rows), SAMPLE_SCHEMA.field(name).type) for name in SAMPLE_SCHEMA.names}
    table = pa.table(empty | {"category_ids": pa.array(rows, SAMPLE_SCHEMA.field("category_ids").type)})
    columns = Columns(manifest_module.write_table(table))
    assert columns.items("category_ids", columns.bounds("category_ids")).tolist() == [
        number for row in rows for number in row
    ]
    assert np.diff(columns.bounds("category_ids")).tolist() == [len(row) for row in rows]
    assert columns.items("category_ids", columns.bounds("category_ids")).dtype == np.int32
    columns = Columns(manifest_module.write_table(table.slice(0, 9000)))
    assert columns.items("category_ids", columns.bounds("category_ids")).dtype == np.uint8


def test_damaged_sample_raises_error_with_its_place(dataset, copy):
    path = copy / dataset.shards[0].name
    data = bytearray(path.read_bytes())
    data[int(dataset.offset[1]) + 700] ^= 1
    path.write_bytes(data)
    damaged = Manifest.load(str(copy), STORAGE)
    damaged.read_sample(0, STORAGE)
    with pytest.raises(DataError, match=rf"sample '{dataset.key[1]}' in .*00000.tar at byte \d+ is damaged"):
        damaged.read_sample(1, STORAGE)


def test_unusable_manifests_are_refused(copy):
    (copy / "samples.parquet").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"samples.parquet does not match its checksum in dataset.json"):
        Manifest.load(str(copy), STORAGE)
    document = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(DataError, match="has format 99, but this version reads 1"):
        Manifest.load(str(copy), STORAGE)
    (copy / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="has format None"):
        Manifest.load(str(copy), STORAGE)
    (copy / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json is not valid JSON"):
        Manifest.load(str(copy), STORAGE)
    (copy / "dataset.json").write_text(json.dumps(document | {"samples": []}))
    with pytest.raises(DataError, match=r"samples.parquet does not match its checksum in dataset.json"):
        Manifest.load(str(copy), STORAGE)
    (copy / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset.json does not exist; write the shards first \(m2f shard\)"):
        Manifest.load(str(copy), STORAGE)


@pytest.mark.parametrize("damage", [lambda t: t.drop(["category_areas"]), lambda t: t.set_column(0, "key", t["shard"])])
def test_lazy_columns_are_checked_when_the_manifest_is_opened(copy, damage):
    data = manifest_module.write_table(damage(pq.read_table(copy / "samples.parquet")))
    (copy / "samples.parquet").write_bytes(data)
    document = json.loads((copy / "dataset.json").read_text())
    document["samples"]["sha256"] = hashlib.sha256(data).hexdigest()
    (copy / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"have invalid content .*(category_areas|key)"):
        Manifest.load(str(copy), STORAGE)


def test_manifest_of_coco_size_loads_fast(tmp_path):
    """Loading 118,287 rows of incompressible numbers took 0.06 s of CPU time; 0.4 s indicates a regression."""
    count, random = 118_287, np.random.default_rng(0)
    lengths = random.integers(1, 8, count)
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    fours = pa.array(np.arange(0, 4 * count + 1, 4), pa.int32())
    ids = pa.array(random.integers(1, 3, lengths.sum()), pa.int32())
    numbers = pa.array(random.integers(0, 1 << 20, count))
    columns = {
        "key": pa.array([f"{i:012d}" for i in range(count)]),
        **dict.fromkeys(("shard", "offset", "length", "crc32", "image_id", "height", "width", "num_segments"), numbers),
        **dict.fromkeys(
            ("category_ids", "category_counts", "category_areas", "category_pixels"),
            pa.ListArray.from_arrays(starts, ids),
        ),
        "member_names": pa.ListArray.from_arrays(fours, pa.array(["img.jpg", "inst.png", "json", "seg.png"] * count)),
        "member_offsets": pa.ListArray.from_arrays(fours, pa.array(random.integers(0, 1 << 18, 4 * count))),
        "member_lengths": pa.ListArray.from_arrays(fours, pa.array(random.integers(0, 1 << 18, 4 * count))),
    }
    table = pa.table({name: columns[name].cast(SAMPLE_SCHEMA.field(name).type) for name in SAMPLE_SCHEMA.names})
    samples = manifest_module.write_table(table.cast(SAMPLE_SCHEMA))
    categories = CategoryTable((Category(1, "a", True, (0, 0, 0)), Category(2, "b", False, (0, 0, 0))))
    document = manifest_module.make_document(
        plan="p",
        source_fingerprint="s",
        categories=categories,
        shards=[ShardInfo("shards/00000.tar", 1, "0", count)],
        samples=samples,
    )
    STORAGE.put(str(tmp_path / "samples.parquet"), samples)
    STORAGE.put(str(tmp_path / "dataset.json"), json.dumps(document).encode())
    start = time.process_time()  # CPU time does not depend on the load of the machine
    manifest = Manifest.load(str(tmp_path), STORAGE)
    seconds = time.process_time() - start
    assert manifest.num_samples == count
    assert manifest.member_names == ("img.jpg", "inst.png", "json", "seg.png")
    assert manifest.statistics()[0].num_segments > 0
    assert seconds < 0.4
    assert len(pickle.dumps(manifest)) < 30e6, "what every rank holds"
    tracemalloc.start()
    try:
        order = build_order([Manifest.load(str(tmp_path), STORAGE)], 0, DataConfig(train=(MixtureItem(dataset="a"),)))
        order.refs(0, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
