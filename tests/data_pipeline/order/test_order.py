import hashlib
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m2f.data_pipeline.config import DataConfig, MixtureItem
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import (
    ORDER_VERSION,
    DatasetOrder,
    MixtureOrder,
    OffsetOrder,
    SampleRef,
    build_order,
    step_positions,
)
from m2f.data_pipeline.order.selection import SamplingRates, uniform_rates


def layout(count, shard_size=100, length=10):
    """Return (shard, offset, length) of `count` samples of varying length, in shards of `shard_size` samples."""
    lengths = length + np.arange(count) % 7
    shard = np.arange(count) // shard_size
    end = np.cumsum(lengths)
    offset = end - lengths
    offset -= np.array([offset[shard == s].min() for s in range(shard.max() + 1)])[shard]
    return shard, offset, lengths


def shard_order(count, *, chunk=100, lanes=4, window=8, seed=0, keep=None, dataset=0):
    chunks = group_chunks(*layout(count)[:2], chunk)
    keep = np.ones(count, bool) if keep is None else keep
    return DatasetOrder(chunks, uniform_rates(keep), seed, lanes, window, dataset)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 700),
    chunk=st.integers(1, 500),
    lanes=st.integers(1, 60),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
)
def test_every_epoch_is_a_bijection(count, chunk, lanes, window, seed, epoch):
    order = shard_order(count, chunk=chunk, lanes=lanes, window=window, seed=seed)
    refs = [order.at(position) for position in range(epoch * count, (epoch + 1) * count)]
    assert {p.epoch for p in refs} == {epoch}
    assert sorted(p.index for p in refs) == list(range(count))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 300))
def test_only_kept_samples_appear(data, count):
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    keep[data.draw(st.integers(0, count - 1))] = True
    order = shard_order(count, keep=keep)
    assert order.rates.total(1) == keep.sum()
    assert sorted(order.at(p).index for p in range(keep.sum())) == np.flatnonzero(keep).tolist()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 400),
    chunk=st.integers(1, 3000),
    seed=st.integers(0, 100),
)
def test_chunks_contain_every_sample_once_and_are_short(count, chunk, seed):
    shuffle = np.random.default_rng(seed).permutation(count)  # the rows of a manifest may be in any order
    shard, offset, _ = (column[shuffle] for column in layout(count))
    chunks = group_chunks(shard, offset, chunk)
    assert sorted(chunks.samples.tolist()) == list(range(count))
    for number in range(len(chunks.shard)):
        members = chunks.members(number)
        assert (chunks.chunk_of[members] == number).all()
        assert (shard[members] == chunks.shard[number]).all()
        assert (np.diff(offset[members]) > 0).all()
        assert offset[members[-1]] - offset[members[0]] < chunk


@settings(max_examples=60, deadline=None)
@given(
    global_batch=st.integers(1, 33),
    micro_batch=st.integers(1, 7),
    worlds=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6),
)
def test_changing_world_sizes_neither_skip_nor_repeat_positions(global_batch, micro_batch, worlds):
    seen, step = [], 0
    for world, steps in worlds:
        for _ in range(steps):
            plans = [step_positions(step, global_batch, rank, world, micro_batch) for rank in range(world)]
            shapes = {tuple(len(batch) for batch in plan) for plan in plans}
            assert len(shapes) == 1, "all ranks must have the same micro-batches"
            sizes = set(next(iter(shapes)))
            assert len(sizes) == 1
            assert sizes.pop() <= micro_batch
            for rank, plan in enumerate(plans):
                positions = [p for batch in plan for p in batch if p is not None]
                assert all(p % world == rank for p in positions)
                seen += positions
            step += 1
    assert sorted(seen) == list(range(step * global_batch))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.fractions(min_value=Fraction(1, 50), max_value=20, max_denominator=50), min_size=2, max_size=5),
    positions=st.integers(1, 400),
)
def test_mixture_reads_every_child_in_order_and_by_its_share(weights, positions):
    class FakeOrder:
        fingerprint = ""

        def __init__(self, dataset):
            self.dataset = dataset

        def at(self, position):
            return SampleRef(self.dataset, 0, position)

    remaining = [sum(weights[k:]) for k in range(len(weights))]
    shares = tuple(w / rest for w, rest in zip(weights, remaining, strict=True))
    mixture = MixtureOrder(tuple(FakeOrder(k) for k in range(len(weights))), shares, "")
    visited = {k: [] for k in range(len(weights))}
    for position in range(positions):
        ref = mixture.at(position)
        visited[ref.dataset].append(ref.index)
        for k, weight in enumerate(weights):
            expected = (position + 1) * weight / remaining[0]
            assert abs(len(visited[k]) - expected) <= len(weights)
    assert all(indices == list(range(len(indices))) for indices in visited.values())


def mixed(counts, weights, *, lanes, window, chunk, repeats=()):
    """Return a mixture of data sets of these sizes. Those in `repeats` use a sample up to three times per epoch."""
    children = []
    for k, count in enumerate(counts):
        order = shard_order(count, chunk=chunk, lanes=lanes, window=window, seed=5, dataset=k)
        if k in repeats:
            random = np.random.default_rng(k)
            order = replace(
                order, rates=SamplingRates(random.integers(1 << 24, 3 << 24, count), random.integers(0, 1 << 24, count))
            )
        children.append(order)
    remaining = [sum(weights[k:]) for k in range(len(weights))]
    shares = tuple(Fraction(w) / rest for w, rest in zip(weights, remaining, strict=True))
    return MixtureOrder(tuple(children), shares, "")


@settings(max_examples=40, deadline=None)
@given(
    sets=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=4),
    lanes=st.integers(1, 50),
    window=st.integers(1, 40),
    chunk=st.integers(1, 400),
    worlds=st.lists(st.tuples(st.integers(1, 17), st.integers(1, 4)), min_size=1, max_size=6),
    global_batch=st.integers(1, 20),
    repeated=st.booleans(),
)
def test_changing_world_sizes_neither_skip_nor_repeat_samples_of_a_mixture(
    sets, lanes, window, chunk, worlds, global_batch, repeated
):
    """For any ranks, the samples sorted by position are the start of each data set's own order, without gaps."""
    counts, weights = zip(*sets, strict=True)
    mixture = mixed(counts, weights, lanes=lanes, window=window, chunk=chunk, repeats=(0,) if repeated else ())
    refs_by_position, step = {}, 0
    for world, steps in worlds:
        for _ in range(steps):
            for rank in range(world):
                for batch in step_positions(step, global_batch, rank, world, 3):
                    refs_by_position |= {p: mixture.at(p) for p in batch if p is not None}
            step += 1
    assert len(refs_by_position) == step * global_batch
    for k, child in enumerate(mixture.children):
        refs = [refs_by_position[p] for p in sorted(refs_by_position) if refs_by_position[p].dataset == k]
        assert refs == [child.at(q) for q in range(len(refs))]
        complete_epochs = [ref.index for ref in refs if ref.epoch < refs[-1].epoch] if refs else []
        expected = sum((child.rates.counts(e) for e in range(refs[-1].epoch)), np.zeros(counts[k])) if refs else 0
        assert (np.bincount(complete_epochs, minlength=counts[k]) == expected).all()


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3),
    start=st.integers(0, 10**7),
    count=st.integers(0, 300),
)
@example(weights=[1 / 3, 988.0], start=0, count=3)
def test_refs_equals_at_for_every_position(weights, start, count):
    weights = [Fraction(str(weight)) for weight in weights]
    mixture = mixed([70, 30, 110][: len(weights)], weights, lanes=6, window=8, chunk=90, repeats=(1,))
    refs = mixture.refs(start, count)
    expected = [mixture.at(p) for p in range(start, start + count)]
    assert refs.dataset.tolist() == [ref.dataset for ref in expected]
    assert refs.index.tolist() == [ref.index for ref in expected]


def test_an_offset_order_starts_at_its_first_position():
    order = shard_order(50)
    shifted = OffsetOrder(order, 30)
    assert [shifted.at(30 + p) for p in range(60)] == [order.at(p) for p in range(60)]
    assert shifted.refs(40, 20).index.tolist() == order.refs(10, 20).index.tolist()


def test_random_access_equals_sequential_access():
    order, sequential = shard_order(500), shard_order(500)
    positions = np.random.default_rng(0).integers(0, 3000, 200).tolist()
    expected = {p: sequential.at(p) for p in sorted(positions)}
    assert [order.at(p) for p in positions] == [expected[p] for p in positions]


def test_epochs_and_seeds_differ():
    order = shard_order(400)
    epochs = [[order.at(e * 400 + p).index for p in range(400)] for e in range(3)]
    other = [shard_order(400, seed=1).at(p).index for p in range(400)]
    second = [shard_order(400, dataset=1).at(p).index for p in range(400)]
    for a, b in [(epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other), (epochs[0], second)]:
        assert np.mean(np.array(a) == np.array(b)) < 0.05


def test_neighbouring_samples_mix_shards_as_well_as_chance():
    """Batches of 16 mix the 20 shards nearly as well as random batches."""
    order = shard_order(2000, chunk=150, lanes=16, window=32)
    indices = np.array([order.at(p).index for p in range(2000)])
    distinct = [len(set(batch // 100)) for batch in indices.reshape(-1, 16)]
    shuffled = np.random.default_rng(0).permutation(2000).reshape(-1, 16)
    assert np.mean(distinct) > np.mean([len(set(batch // 100)) for batch in shuffled]) - 0.7


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_that_divide_the_lanes_read_nearly_every_chunk_once(world):
    order = shard_order(4800, chunk=300, lanes=8, window=16)
    readers = Counter()
    for rank in range(world):
        chunks = {int(order.chunks.chunk_of[order.at(p).index]) for p in range(rank, 4800, world)}
        readers.update(chunks)
    assert sum(readers.values()) <= len(order.chunks.shard) + order.lanes


def test_order_equals_its_golden_file():
    """If the order changes on purpose, raise ORDER_VERSION and write new golden files."""
    order = shard_order(1000, chunk=200, lanes=6, window=16, seed=1234)
    indices = np.array([order.at(p).index for p in range(3000)], dtype="<i8")
    found = {"first": indices[:24].tolist(), "sha256": hashlib.sha256(indices.tobytes()).hexdigest()}
    assert found == json.loads(golden("order"))


def test_order_of_mixtures_and_repeats_equals_its_golden_file(make_manifest):
    manifests = [make_manifest(400, seed=1, sample_bytes=4000), make_manifest(150, seed=2, sample_bytes=4000)]
    items = (
        MixtureItem(dataset="a", weight=2.5, repeat_threshold=0.1),
        MixtureItem(dataset="b", exclude=("class 1",), fraction=0.5),
    )
    order = build_order(manifests, 99, DataConfig(train=items, chunk_mb=0.02, lanes=6, window=16))
    refs = order.refs(0, 3000)
    both = np.stack([refs.dataset, refs.index], axis=1).astype("<i8")
    found = {
        "fingerprint": order.fingerprint,
        "first": both[:24].tolist(),
        "sha256": hashlib.sha256(both.tobytes()).hexdigest(),
    }
    assert found == json.loads(golden("mixture"))


def golden(name):
    return (Path(__file__).parent / f"golden_{name}_v{ORDER_VERSION}.json").read_text()
