import time
from dataclasses import replace

import pytest

from m2f.data_pipeline.config import DataConfig, DatasetConfig, MixtureItem
from m2f.data_pipeline.loading.fetch import FetchLimits, SampleFetcher
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import build_order, chunk_bytes, look_ahead
from m2f.data_pipeline.order.read_simulation import SimulatedRanks, format_read_costs, simulate_reads
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

CONFIG = DataConfig(train=(MixtureItem(dataset="a"),), chunk_mb=0.06, lanes=4, window=2, workers=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    source = SyntheticSource(num_images=40, seed=4)
    config = DatasetConfig(shards=str(tmp_path_factory.mktemp("set")), source=source, shard_mb=0.3)
    return write_dataset(open_reader(source), config, Storage())


class Counting(Storage):
    def __init__(self):
        super().__init__()
        self.reads = self.bytes = 0

    def get_range(self, url, offset, length, etag=None):
        self.reads, self.bytes = self.reads + 1, self.bytes + length
        return super().get_range(url, offset, length, etag)


def ranks(world, **changes):
    return SimulatedRanks(**{"world": world, "per_machine": 2, "batch": 2, "images_per_s": 10.0, **changes})


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [None, 0.9])
def test_simulated_reads_equal_actual_reads(written, world, repeats):
    data = replace(CONFIG, train=(MixtureItem(dataset="a", repeat_threshold=repeats),))
    order = build_order([written], 7, data)
    found = simulate_reads([written], order, data, 7, ranks(world))
    chunks, storage = group_chunks(written.shard, written.offset, chunk_bytes(data)), Counting()
    for rank in range(world):
        groups = [(order.at(p),) for p in range(rank, found.images, world)]
        limits = FetchLimits(groups_ahead=1, horizon=1 + look_ahead(data, world))
        fetcher = SampleFetcher([written], [chunks], storage, iter(groups), limits)
        assert len(list(fetcher)) == len(groups)
        fetcher.close()
    if repeats is None:
        assert found.images == 40
        assert found.chunk_bytes == written.length.sum()
        assert (found.reads, found.read_bytes) == (storage.reads, storage.bytes)
    else:
        assert found.images > 45
        assert found.reads == pytest.approx(storage.reads, rel=0.15)
    assert found.cached_reads <= found.reads
    assert 0 < found.fetched_peak <= found.read_bytes


def test_simulated_peak_memory_equals_a_brute_force_count(written):
    order = build_order([written], 7, CONFIG)
    chunks = group_chunks(written.shard, written.offset, chunk_bytes(CONFIG))
    places = [order.at(p).index for p in range(40)]
    first = {}
    for position, index in enumerate(places):
        first.setdefault((position % 2, int(chunks.chunk_of[index])), position)
    peak = 0
    for rank in range(2):
        for now in range(40):
            held = sum(
                int(written.length[index])
                for position, index in enumerate(places)
                if position % 2 == rank and first[rank, int(chunks.chunk_of[index])] <= now <= position
            )
            peak = max(peak, held)
    wide = replace(CONFIG, window=64)  # nothing is read twice
    assert simulate_reads([written], order, wide, 7, ranks(2)).fetched_peak == peak


def test_default_lanes_read_coco_once_if_ranks_divide_them(make_manifest):
    """Measured: 0.35 s each. 64 ranks do not divide 48 lanes, and read nearly every chunk four times."""
    manifest, found = make_manifest(118_287), {}
    default = DataConfig(train=CONFIG.train)
    for data, world in ((default, 24), (default, 64), (replace(default, lanes=48), 64)):
        order = build_order([manifest], 0, data)
        start = time.process_time()
        found[data.lanes, world] = simulate_reads(
            [manifest], order, data, 0, ranks(world, per_machine=8, images_per_s=40.0)
        )
        assert time.process_time() - start < 3
    whole, fitting, wrong = found.values()
    assert wrong.images == fitting.images == 118_287
    assert max(whole.reads / whole.chunks, fitting.reads / fitting.chunks) < 1.05
    assert wrong.reads / wrong.chunks > 3
    assert wrong.cached_reads < wrong.reads
    assert fitting.fetched_peak < 50e6
    text = format_read_costs(fitting, ranks(64, per_machine=8, images_per_s=40.0))
    assert text.startswith("64 ranks with 2 images each on 8 machines, 2,560 images/s in total")
    assert "118,287 images" in text
