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
def dataset(tmp_path_factory):
    source = SyntheticSource(num_images=40, seed=4)
    config = DatasetConfig(shards=str(tmp_path_factory.mktemp("set")), source=source, shard_mb=0.3)
    return write_dataset(open_reader(source), config, Storage())


class CountingStorage(Storage):
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
def test_simulated_reads_equal_actual_reads(dataset, world, repeats):
    data = replace(CONFIG, train=(MixtureItem(dataset="a", repeat_threshold=repeats),))
    order = build_order([dataset], 7, data)
    costs = simulate_reads([dataset], order, data, 7, ranks(world))
    chunks, storage = group_chunks(dataset.shard, dataset.offset, chunk_bytes(data)), CountingStorage()
    for rank in range(world):
        groups = [(order.at(p),) for p in range(rank, costs.images, world)]
        limits = FetchLimits(groups_ahead=1, horizon=1 + look_ahead(data, world))
        fetcher = SampleFetcher([dataset], [chunks], storage, iter(groups), limits)
        assert len(list(fetcher)) == len(groups)
        fetcher.close()
    if repeats is None:
        assert costs.images == 40
        assert costs.chunk_bytes == dataset.length.sum()
        assert (costs.reads, costs.read_bytes) == (storage.reads, storage.bytes)
    else:
        assert costs.images > 45
        assert costs.reads == pytest.approx(storage.reads, rel=0.15)
    assert costs.cached_reads <= costs.reads
    assert 0 < costs.fetched_peak <= costs.read_bytes


def test_simulated_peak_memory_equals_a_brute_force_count(dataset):
    order = build_order([dataset], 7, CONFIG)
    chunks = group_chunks(dataset.shard, dataset.offset, chunk_bytes(CONFIG))
    indices = [order.at(p).index for p in range(40)]
    first = {}
    for position, index in enumerate(indices):
        first.setdefault((position % 2, int(chunks.chunk_of[index])), position)
    peak = 0
    for rank in range(2):
        for now in range(40):
            num_bytes = sum(
                int(dataset.length[index])
                for position, index in enumerate(indices)
                if position % 2 == rank and first[rank, int(chunks.chunk_of[index])] <= now <= position
            )
            peak = max(peak, num_bytes)
    wide_window = replace(CONFIG, window=64)  # no chunk is read twice
    assert simulate_reads([dataset], order, wide_window, 7, ranks(2)).fetched_peak == peak


def test_default_lanes_read_coco_once_if_ranks_divide_them(make_manifest):
    """Each simulation took 0.35 s. 64 ranks do not divide 48 lanes, and read nearly every chunk four times."""
    manifest, costs = make_manifest(118_287), {}
    default = DataConfig(train=CONFIG.train)
    for data, world in ((default, 24), (default, 64), (replace(default, lanes=48), 64)):
        order = build_order([manifest], 0, data)
        start = time.process_time()
        costs[data.lanes, world] = simulate_reads(
            [manifest], order, data, 0, ranks(world, per_machine=8, images_per_s=40.0)
        )
        assert time.process_time() - start < 3
    ranks_24, ranks_64, undivided = costs.values()
    assert undivided.images == ranks_64.images == 118_287
    assert max(ranks_24.reads / ranks_24.chunks, ranks_64.reads / ranks_64.chunks) < 1.05
    assert undivided.reads / undivided.chunks > 3
    assert undivided.cached_reads < undivided.reads
    assert ranks_64.fetched_peak < 50e6
    text = format_read_costs(ranks_64, ranks(64, per_machine=8, images_per_s=40.0))
    assert text.startswith("64 ranks with 2 images each on 8 machines, 2,560 images/s in total")
    assert "118,287 images" in text
