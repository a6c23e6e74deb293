import itertools
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f.data_pipeline.config import (
    CopyPasteConfig,
    DataConfig,
    DatasetConfig,
    LargeScaleJitter,
    MixtureItem,
    ScaleJitter,
)
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.fetch import FetchLimits, SampleFetcher
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import build_order, chunk_bytes, look_ahead
from m2f.data_pipeline.order.read_simulation import SimulatedRanks, simulate_reads
from m2f.data_pipeline.randomness import Stream
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.copy_paste import draw_objects, partner_position, paste
from m2f.data_pipeline.transforms.example import (
    TrainTransform,
    augment_sample,
    make_example,
    paste_objects,
    without_empty_targets,
)
from m2f.data_pipeline.transforms.targets import ImageTargets
from m2f.model.errors import ConfigError

BATCH = 6
DATA = DataConfig(
    train=(MixtureItem(dataset="a"),),
    augment=LargeScaleJitter(size=96, min_scale=0.5, max_scale=1.5),
    copy_paste=CopyPasteConfig(probability=0.8),
    workers=0,
    chunk_mb=0.06,
    lanes=4,
    window=3,
)


def write_shapes(folder):
    source = SyntheticSource(num_images=40, seed=4)
    return write_dataset(open_reader(source), DatasetConfig(shards=str(folder), source=source, shard_mb=0.3), Storage())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("set"))


def random_targets(rng, layers, count, dtype=np.uint8, size=(12, 14)):
    """Return targets 1..count as rectangles over a background with ignored pixels. Some may be fully covered."""
    ignore = 255 if dtype == np.uint8 else 32767
    maps = np.where(rng.random((layers, *size)) < 0.1, ignore, 0).astype(dtype)
    layer = rng.integers(0, layers, count)
    for id_, k in enumerate(layer, start=1):
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        maps[k, y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = id_
    return ImageTargets(maps, rng.integers(0, 4, count), layer, np.arange(1, count + 1))


def one_per_class(targets):
    """Merge all targets of a class into its first one, as in semantic targets."""
    _, first = np.unique(targets.labels, return_index=True)
    maps = targets.id_maps.copy()
    for label, id_ in zip(targets.labels, targets.local_id, strict=True):
        maps[targets.id_maps == id_] = targets.local_id[first[targets.labels[first] == label][0]]
    return ImageTargets(maps, targets.labels[first], targets.layer[first], targets.local_id[first])


def masks(targets):
    """Return (class, mask, mask of ignored pixels) of every target."""
    return [
        (int(label), targets.id_maps[k] == id_, targets.id_maps[k] == targets.ignore)
        for label, k, id_ in zip(targets.labels, targets.layer, targets.local_id, strict=True)
    ]


def paste_by_masks(base, partner, objects, merge):
    """Reference with one boolean mask per target, as in the paper."""
    pasted = [masks(partner)[row] for row in objects]
    covered = np.any([mask for _, mask, _ in pasted], axis=0)
    result, hidden = [], 0
    for label, mask, unlabelled in masks(base):
        visible = mask & ~covered
        if merge:
            for other, added, _ in pasted:
                visible |= added & (other == label)
        if mask.any() and not visible.any():
            hidden += 1
            continue
        result.append((label, visible, unlabelled & ~covered))
    base_labels = {label for label, _, _ in masks(base)} if merge else set()
    unlabelled = (base.id_maps == base.ignore).any(axis=0) & ~covered
    for row in objects:
        label, mask, _ = masks(partner)[row]
        if label not in base_labels:
            layer = partner.layer[row]
            ignored = base.id_maps[layer] == base.ignore if layer < len(base.id_maps) else unlabelled
            result.append((label, mask, ignored & ~covered))
    return result, covered, hidden


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    counts=st.tuples(st.integers(0, 7), st.integers(1, 7)),
    wide=st.tuples(st.booleans(), st.booleans()),
    semantic=st.booleans(),
)
def test_pasting_equals_a_loop_over_masks(seed, layers, counts, wide, semantic):
    rng = np.random.default_rng(seed)
    if semantic:
        layers = (1, 1)
    base, partner = (
        random_targets(rng, y, n, np.int16 if w else np.uint8) for y, n, w in zip(layers, counts, wide, strict=True)
    )
    if semantic:
        base, partner = one_per_class(base), one_per_class(partner)
    objects = np.array([row for row, (_, mask, _) in enumerate(masks(partner)) if mask.any() and rng.random() < 0.7])
    if not len(objects):
        return
    before = base.id_maps.copy()
    result = paste(base, partner, objects, merge_classes=semantic)
    expected, covered, hidden = paste_by_masks(base, partner, objects, semantic)
    np.testing.assert_array_equal(result.mask, covered)
    for actual, reference in zip(masks(result.targets), expected, strict=True):
        assert actual[0] == reference[0]
        np.testing.assert_array_equal(actual[1], reference[1])
        np.testing.assert_array_equal(actual[2], reference[2])
    assert result.hidden == hidden
    assert len(set(result.targets.local_id.tolist())) == len(result.targets.local_id)
    np.testing.assert_array_equal(base.id_maps, before)


def test_pasting_beyond_254_targets_widens_the_map():
    base = ImageTargets(
        np.arange(1, 255, dtype=np.uint8).reshape(1, 2, 127), np.zeros(254, int), np.zeros(254, int), np.arange(1, 255)
    )
    base.id_maps[0, 0, 0] = 255
    maps = np.zeros((1, 2, 127), np.uint8)
    maps[0, 1, 5:7] = 1
    result = paste(
        base, ImageTargets(maps, np.array([3]), np.array([0]), np.array([1])), np.array([0]), merge_classes=False
    )
    assert result.targets.id_maps.dtype == np.int16
    assert result.targets.id_maps[0, 0, 0] == result.targets.ignore == 32767
    assert result.hidden == 2
    assert (result.targets.labels == 3).sum() == 1
    assert (result.targets.id_maps[0, 1, 5:7] == 255).all()


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_pasted_pixels_match_their_targets(dataset, task):
    """Pixels and targets come from the same image: the partner under pasted objects, the base image elsewhere."""
    table = dataset.categories
    things = frozenset(label for label, c in enumerate(table.for_task(task)) if c.is_thing)
    transform = TrainTransform(task, table.labels(task), DATA.augment, drop_empty_targets=True, seed=3, things=things)
    samples = [dataset.read_sample(row, Storage()) for row in (5, 9)]
    changed = 0
    for position in range(12):
        base = augment_sample(samples[0], 0, position, transform, Stream.AUGMENT)
        partner = augment_sample(samples[1], 0, position, transform, Stream.PASTED)
        result = without_empty_targets(paste_objects(base, partner, transform), transform)
        objects = draw_objects(partner.targets, things, 3, position)
        assert set(partner.targets.labels[objects].tolist()) <= things
        mask = np.zeros((96, 96), bool)
        for row in objects:
            mask |= partner.targets.id_maps[partner.targets.layer[row]] == partner.targets.local_id[row]
        np.testing.assert_array_equal(result.image, np.where(mask[..., None], partner.image, base.image))
        plain = make_example(samples[0], 0, position, transform)
        if not mask.any():
            np.testing.assert_array_equal(result.targets.id_maps, plain.targets.id_maps)
            assert result.size == plain.size
            continue
        changed += 1
        rows, columns = np.nonzero(mask)
        assert result.size == (max(plain.size[0], rows.max() + 1), max(plain.size[1], columns.max() + 1))
        assert all(pixels.any() for _, pixels, _ in masks(result.targets))
        if task == "semantic":
            assert len(set(result.targets.labels)) == len(result.targets.labels)
        else:
            num_removed = len(plain.targets.labels) + len(objects) - len(result.targets.labels)
            assert result.dropped == plain.dropped + num_removed
    assert changed > 6


def load_samples(manifest, data, steps, storage=None, world=1, ranks=None, start=0, micro_batch=2):
    """Return {position: (key, pixels, ids, labels, size)} and the substitutions."""
    samples, substitutions = {}, []
    order = build_order([manifest], 3, data)
    for rank in range(world) if ranks is None else ranks:
        spec = LoaderSpec(global_batch=BATCH, micro_batch=micro_batch, rank=rank, world=world, start_step=start, seed=3)
        loader = build_loader([manifest], order, data, storage or Storage(), spec)
        for step in itertools.islice(loader, steps):
            substitutions += step.substitutions
            for batch in step.micro_batches:
                for row, position in enumerate(batch.targets.position.tolist()):
                    if position >= 0:
                        valid = batch.targets.valid[row]
                        samples[position] = (
                            batch.keys[row],
                            batch.images[row].numpy().tobytes(),
                            # Empty layers are omitted: their number depends on the other rows of the batch.
                            [m.tobytes() for m in batch.targets.id_maps[row].numpy() if m.any()],
                            batch.targets.labels[row][valid].tolist(),
                            batch.sizes[row].tolist(),
                        )
        loader.close()
    return samples, substitutions


def test_pixels_depend_only_on_the_position(dataset):
    reference, _ = load_samples(dataset, DATA, 8)
    assert sorted(reference) == list(range(8 * BATCH))
    without_pasting, _ = load_samples(dataset, replace(DATA, copy_paste=None), 8)
    assert sum(without_pasting[p] != reference[p] for p in without_pasting) > 20
    assert [without_pasting[p][0] for p in sorted(without_pasting)] == [
        reference[p][0] for p in sorted(without_pasting)
    ]
    for world, micro_batch in [(2, 3), (5, 1)]:
        assert load_samples(dataset, DATA, 8, world=world, micro_batch=micro_batch)[0] == reference
    assert load_samples(dataset, DATA, 3, start=5)[0] == {p: v for p, v in reference.items() if p >= 5 * BATCH}
    assert load_samples(dataset, replace(DATA, workers=1), 3)[0] == {
        p: v for p, v in reference.items() if p < 3 * BATCH
    }


class RecordingStorage(Storage):
    def __init__(self):
        super().__init__()
        self.ranges = []

    def get_range(self, url, offset, length, etag=None):
        self.ranges.append((url, offset))
        return super().get_range(url, offset, length, etag)


def reads_of_an_epoch(manifest, data, world):
    """Return the number of ranged reads of all ranks for exactly the positions of one epoch."""
    order, storage = build_order([manifest], 3, data), RecordingStorage()
    chunks = group_chunks(manifest.shard, manifest.offset, chunk_bytes(data))
    for rank in range(world):
        partners = [(p, partner_position(p, 3, data)) for p in range(rank, manifest.num_samples, world)]
        groups = [tuple(None if p is None else order.at(p) for p in pair) for pair in partners]
        limits = FetchLimits(groups_ahead=1, horizon=1 + look_ahead(data, world))
        with closing(SampleFetcher([manifest], [chunks], storage, iter(groups), limits)) as fetcher:
            assert len(list(fetcher)) == len(groups)
    return len(storage.ranges)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_simulated_reads_with_partners_equal_actual_reads(dataset, world):
    """If the ranks divide the lanes, partners add few reads: those of chunks beyond the end of the epoch."""
    order = build_order([dataset], 3, DATA)
    costs = simulate_reads(
        [dataset], order, DATA, 3, SimulatedRanks(world=world, per_machine=1, batch=2, images_per_s=1.0)
    )
    reads, reads_without_pasting = (
        reads_of_an_epoch(dataset, data, world) for data in (DATA, replace(DATA, copy_paste=None))
    )
    assert costs.images == 40
    assert costs.reads == reads
    assert world == 3 or reads <= reads_without_pasting + 2 * DATA.lanes


def test_partners_come_from_the_same_lane_with_the_set_probability():
    data = replace(DATA, lanes=12, window=5)
    partners = [partner_position(p, 0, data) for p in range(4000)]
    steps = {(other - p) for p, other in enumerate(partners) if other is not None}
    assert steps == {12, 24, 36, 48, 60}
    assert 0.78 < np.mean([other is not None for other in partners]) < 0.82
    assert partners != [partner_position(p, 1, data) for p in range(4000)]
    assert partner_position(7, 0, replace(data, copy_paste=None)) is None


def test_a_damaged_partner_is_replaced_and_reported(tmp_path):
    """The base image keeps its position; the reported cause names the partner."""
    manifest = write_shapes(tmp_path)
    order = build_order([manifest], 3, DATA)
    reference, _ = load_samples(manifest, DATA, 4)
    bad_position = next(
        other
        for p in range(4 * BATCH)
        if (other := partner_position(p, 3, DATA)) is not None and order.at(other).index != order.at(p).index
    )
    row = order.at(bad_position).index
    path = Path(manifest.shard_url(int(manifest.shard[row])))
    content = bytearray(path.read_bytes())
    content[int(manifest.offset[row]) + int(manifest.length[row]) // 2] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(manifest.key[row])):
        load_samples(manifest, DATA, 4)
    samples, substitutions = load_samples(manifest, replace(DATA, max_bad_samples=1), 4)
    assert {s.key for s in substitutions} == {manifest.key[row]}
    affected = {s.position for s in substitutions}
    as_partner = {
        p for p in range(4 * BATCH) if (q := partner_position(p, 3, DATA)) is not None and order.at(q).index == row
    }
    assert affected == as_partner | {p for p in range(4 * BATCH) if order.at(p).index == row}
    for position in as_partner & affected:
        if order.at(position).index != row:
            assert samples[position][0] == reference[position][0]
    assert {p: v for p, v in samples.items() if p not in affected} == {
        p: v for p, v in reference.items() if p not in affected
    }
    for world in (2, 3):
        again, reported = load_samples(manifest, replace(DATA, max_bad_samples=1), 4, world=world)
        assert again == samples
        assert sorted(map(repr, reported)) == sorted(map(repr, substitutions))


def test_unsupported_settings_are_refused(dataset):
    with pytest.raises(ConfigError, match=r"data\.copy_paste needs images of equal size"):
        replace(DATA, augment=ScaleJitter())
    with pytest.raises(ConfigError, match="CopyPasteConfig: probability is 0; it must be above 0"):
        CopyPasteConfig(probability=0)
    stuff = replace(
        dataset,
        categories=replace(
            dataset.categories,
            categories=tuple(replace(c, is_thing=False) for c in dataset.categories.categories),
        ),
    )
    with pytest.raises(DataError, match=r"no class is a thing, so data\.copy_paste has nothing to paste"):
        load_samples(stuff, DATA, 1)
