import io
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.config import DataConfig, MixtureItem
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.order.selection import SamplingRates, repeat_factors, select, uniform_rates
from m2f.data_pipeline.shards.columns import Columns
from m2f.data_pipeline.shards.manifest import Manifest, write_table
from m2f.data_pipeline.shards.stats import class_table
from m2f.model.errors import ConfigError

ONCE = 1 << 24


@pytest.fixture(scope="module")
def manifest(make_manifest) -> Manifest:
    return make_manifest(600, sample_bytes=4000, shard_samples=100)


def item(**changes):
    return MixtureItem(dataset="train", **changes)


def config(**changes):
    return DataConfig(train=(item(),), chunk_mb=0.05, lanes=4, window=8, **changes)


def select_rates(manifest, **changes):
    return select(manifest, item(**changes), config(), seed=1, dataset=0)


def classes(manifest, index):
    return {f"class {k - 1}" for k in manifest.category_ids[index].tolist()}


def test_class_filters_equal_a_loop_over_the_images(manifest):
    rates = select_rates(manifest, include=("class 2", "class 4"), exclude=("class 1",))
    expected = [
        bool(classes(manifest, i) & {"class 2", "class 4"}) and "class 1" not in classes(manifest, i)
        for i in range(600)
    ]
    assert rates.selected.tolist() == expected
    assert 0 < sum(expected) < 300


def test_unknown_classes_and_empty_selections_are_refused(manifest):
    with pytest.raises(
        DataError, match=r"include of 'train' lists the class 'clas 2', which it does not have; did you mean"
    ):
        select_rates(manifest, include=("clas 2",))
    with pytest.raises(DataError, match=r"none of its 600 images matches include .* and exclude .* of 'train'"):
        select_rates(manifest, include=("class 3",), exclude=("class 3",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weight": 0}, "MixtureItem: weight is 0; it must be above 0"),
        ({"fraction": 0}, "fraction is 0; it must be above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction is 1.5; it must be"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"repeat_threshold": 0.0}, "repeat_threshold is 0.0; it must be above 0"),
    ],
)
def test_invalid_settings_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        item(**setting)


def test_subsets_are_nested_and_do_not_depend_on_the_shards(manifest):
    parts = [set(manifest.key[select_rates(manifest, fraction=f).selected]) for f in (0.1, 0.25, 0.5)]
    everything = select_rates(manifest).selected
    assert [len(part) for part in parts] == [round(f * everything.sum()) for f in (0.1, 0.25, 0.5)]
    assert parts[0] < parts[1] < parts[2]
    rows = pq.read_table(io.BytesIO(manifest.columns.data))
    other = replace(manifest, columns=Columns(write_table(rows.take(np.arange(600)[::-1]))))
    assert set(other.key[select_rates(other, fraction=0.1).selected]) == parts[0]
    assert set(manifest.key[select_rates(manifest, limit=7).selected]) < parts[0]
    assert select_rates(manifest, fraction=0.25, limit=7).selected.sum() == 7


def test_repeat_factors_are_those_of_the_paper(manifest):
    selected = select_rates(manifest, exclude=("class 2",)).selected
    rows = np.flatnonzero(selected)
    images = Counter(name for i in rows for name in classes(manifest, i))
    factors = repeat_factors(manifest, selected, 0.05, [c.id for c in manifest.categories.categories])
    for i in rows:
        expected = max(max(1.0, math.sqrt(0.05 / (images[name] / len(rows)))) for name in classes(manifest, i))
        assert factors[i] == pytest.approx(expected, rel=1e-12)
    assert factors.max() > 1.5


def test_stuff_does_not_raise_the_repeat_factors_of_instance_segmentation(manifest):
    *others, thing = manifest.categories.categories
    stuff = [replace(category, is_thing=False) for category in others]
    manifest = replace(manifest, categories=CategoryTable((*stuff, replace(thing, is_thing=True))))
    everything = np.ones(manifest.num_samples, dtype=bool)
    things = list(manifest.categories.labels("instance"))
    frequency = np.mean([thing.name in classes(manifest, i) for i in range(manifest.num_samples)])
    factors = repeat_factors(manifest, everything, 0.99, things)
    assert sorted(set(factors)) == [1.0, pytest.approx(math.sqrt(0.99 / frequency))]


@given(
    rates=st.lists(st.one_of(st.just(0.0), st.floats(1.0, 9.0)), min_size=1, max_size=20).filter(any),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 100),
)
def test_uses_of_a_sample_differ_from_its_rate_by_less_than_one(rates, epoch, seed):
    rate = np.array([round(r * ONCE) for r in rates])
    rates = SamplingRates(rate, np.random.default_rng(seed).integers(0, ONCE, len(rate)))
    counts = rates.counts(epoch)
    assert ((counts == rate // ONCE) | (counts == -(-rate // ONCE))).all()
    assert rates.total(epoch + 1) - rates.total(epoch) == counts.sum()
    for position in (rates.total(epoch), rates.total(epoch + 1) - 1):
        assert rates.epoch_of(position) == epoch
    if epoch < 50:
        total_uses = sum((rates.counts(e) for e in range(epoch)), np.zeros(len(rate), dtype=np.int64))
        assert (np.abs(total_uses - epoch * rate / ONCE) < 1).all()


def test_fractional_rates_are_met_on_average():
    phase = np.random.default_rng(0).integers(0, ONCE, 4000)
    rates = SamplingRates(np.full(4000, int(1.3 * ONCE)), phase)
    for epoch in range(5):
        assert rates.counts(epoch).mean() == pytest.approx(1.3, abs=0.03)


def test_epoch_uses_every_image_as_often_as_its_rate(manifest):
    settings = replace(config(), train=(item(repeat_threshold=0.05),))
    order = build_order([manifest], 1, settings)
    rates = select(manifest, settings.train[0], settings, 1, 0)
    assert rates.repeats
    start = 0
    for epoch in range(3):
        refs = [order.at(p) for p in range(start, rates.total(epoch + 1))]
        assert {ref.epoch for ref in refs} == {epoch}
        uses = np.bincount([ref.index for ref in refs], minlength=600)
        assert uses.tolist() == rates.counts(epoch).tolist()
        start = rates.total(epoch + 1)
    assert order.at(5) == build_order([manifest], 1, settings).at(5)


def test_repeats_are_spread_over_the_epoch(manifest):
    settings = replace(config(), train=(item(repeat_threshold=0.2),))
    order = build_order([manifest], 1, settings)
    count = select(manifest, settings.train[0], settings, 1, 0).total(1)
    rows = order.refs(0, count).index
    most_repeated = np.argmax(np.bincount(rows))
    positions = np.flatnonzero(rows == most_repeated)
    assert len(positions) >= 4
    assert positions[-1] - positions[0] > count / 3


def test_filters_are_part_of_the_fingerprint(manifest):
    changes = [
        {},
        {"include": ("class 2",)},
        {"exclude": ("class 2",)},
        {"fraction": 0.5},
        {"limit": 9},
        {"repeat_threshold": 0.05},
        {"repeat_threshold": 0.06},
    ]
    fingerprints = [build_order([manifest], 1, replace(config(), train=(item(**c),))).fingerprint for c in changes]
    assert len(set(fingerprints)) == len(changes)
    without_effect = replace(config(), train=(item(limit=5000, repeat_threshold=1e-9),))
    assert build_order([manifest], 1, without_effect).fingerprint == fingerprints[0]


def test_uniform_rates_use_every_kept_sample_once():
    rates = uniform_rates(np.array([True, False, True]))
    assert rates.counts(10**6).tolist() == [1, 0, 1]
    assert (rates.total(7), rates.per_epoch, rates.repeats) == (14, 2.0, False)


def test_queries_of_a_coco_sized_manifest_take_little_cpu_time(make_manifest):
    """Measured CPU time: 0.03 s for the table, 0.25 s for the slowest selection."""
    manifest = make_manifest(118_287)
    start = time.process_time()
    rows = class_table(manifest)
    statistics_s = time.process_time() - start
    start = time.process_time()
    rates = select_rates(manifest, include=("class 0",), exclude=("class 19",), fraction=0.5, repeat_threshold=0.01)
    selection_s = time.process_time() - start
    assert rows[0].num_images == 118_287
    assert rates.repeats
    assert statistics_s < 1
    assert selection_s < 2
