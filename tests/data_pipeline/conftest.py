import numpy as np
import pyarrow as pa
import pytest

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA, Columns
from m2f.data_pipeline.shards.manifest import Manifest, Ragged, ShardInfo, write_table

CLASSES = 20


def _ragged(lengths, values):
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))


def _columns(keys, lengths, ids):
    """Return manifest columns with keys and categories; every category has one segment of 100 pixels."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    values = {"category_ids": ids, "category_counts": np.ones_like(ids), "category_areas": np.full_like(ids, 100)}
    lists = {
        name: pa.ListArray.from_arrays(offsets, pa.array(numbers, SAMPLE_SCHEMA.field(name).type.value_type))
        for name, numbers in values.items()
    }
    return Columns(write_table(pa.table({"key": keys, **lists})))


@pytest.fixture(scope="session")
def make_manifest():
    """Return a factory of manifests without shards. Class k occurs in an image with probability 1 / (k + 1)^2."""

    def make(count, seed=0, sample_bytes=150_000, shard_samples=1000):
        random = np.random.default_rng(seed)
        is_present = random.random((count, CLASSES)) < 1 / np.arange(1, CLASSES + 1) ** 2
        column = np.nonzero(is_present)[1]
        length = random.integers(sample_bytes // 2, sample_bytes * 3 // 2, count) // 512 * 512
        shard = np.arange(count) // shard_samples
        end = np.cumsum(length)
        first = np.unique(shard, return_index=True)[1]
        offset = end - length - (end - length)[first][shard]
        ones = np.ones(count, dtype=np.int64)
        names = _ragged(ones, np.zeros(count, dtype=np.int32))
        table = CategoryTable(tuple(Category(k + 1, f"class {k}", k % 2 == 0, (k, k, k)) for k in range(CLASSES)))
        return Manifest(
            url="memory",
            fingerprint=f"{count}-{seed}",
            plan="",
            categories=table,
            shards=tuple(
                ShardInfo(f"{s:05d}.tar", int(length[shard == s].sum()), f"{seed}x{s}", int((shard == s).sum()))
                for s in range(shard[-1] + 1)
            ),
            columns=_columns([f"image_{i:08d}" for i in range(count)], is_present.sum(1), column + 1),
            shard=shard.astype(np.int32),
            offset=offset,
            length=length,
            crc32=ones.astype(np.uint32),
            image_id=np.arange(count),
            height=ones.astype(np.int32) * 480,
            width=ones.astype(np.int32) * 640,
            num_segments=is_present.sum(1).astype(np.int32),
            member_names=("img.jpg",),
            member_codes=names,
            member_offsets=names,
            member_lengths=names,
        )

    return make
