import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch

import m2f
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.data_pipeline.config import DataConfig, DatasetConfig, LargeScaleJitter, MixtureItem, StorageConfig
from m2f.data_pipeline.errors import DataError, LoaderDiedError, StorageError
from m2f.data_pipeline.loading.fetch import FetchLimits, SampleFetcher
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader, eval_batches, eval_groups, mixture_labels
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import SampleRef, build_order
from m2f.data_pipeline.sample import Annotation, Sample, Segment
from m2f.data_pipeline.shards.write import commit_manifest, plan_shards, write_shard
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import padded_eval_size
from tests.waiting import PATIENCE_S, wait_until

TABLE = CategoryTable((Category(1, "ground", False, (0, 90, 0)), Category(4, "box", True, (200, 0, 0))))


class BoxReader:
    """Reader of small noise images, each annotated with a box on the ground. Every fifth has no annotation."""

    def __init__(self, count, prefix="box", categories=TABLE):
        self.categories = categories
        self.keys = [f"{prefix}_{i:04d}" for i in range(count)]

    def files(self, index):
        return ()

    def source(self, index):
        return f"{self.keys[index]}.jpg"

    def size_hint(self, index):
        return 4000

    def subset(self, indices):
        raise NotImplementedError

    def read(self, index):
        rng = np.random.default_rng(index)
        height, width = 24 + index % 9, 40 - index % 7
        seg = np.full((height, width), 1, np.uint8)
        seg[6:14, 8:20] = 2
        segments = tuple(
            Segment(
                id=i,
                category_id=c.id,
                is_thing=c.is_thing,
                is_crowd=False,
                area=float((seg == i).sum()),
                bbox=(0.0, 0.0, 1.0, 1.0),
                source_id=i,
                map="seg",
            )
            for i, c in enumerate(sorted(self.categories.categories[:2], key=lambda c: c.is_thing), start=1)
        )
        if index % 5 == 4:
            seg, segments = np.zeros_like(seg), ()
        image = cv2.imencode(".jpg", rng.integers(0, 255, (height, width, 3), dtype=np.uint8))[1].tobytes()
        return Sample(
            key=self.keys[index],
            image_id=index,
            source=f"{self.keys[index]}.jpg",
            image=image,
            image_ext="jpg",
            height=height,
            width=width,
            annotation=Annotation(seg=seg, inst=None, segments=segments),
        )


def write_boxes(folder, count=60, prefix="box", categories=TABLE, storage=None):
    config = DatasetConfig(shards=str(folder), shard_mb=0.05)
    reader = BoxReader(count, prefix, categories)
    storage = storage or Storage(StorageConfig())
    plan = plan_shards(reader, config, f"{prefix}{count}")
    return commit_manifest(plan, [write_shard(reader, plan, i, storage) for i in range(len(plan.shard_keys))], storage)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return write_boxes(tmp_path_factory.mktemp("boxes"))


def data_config(**changes):
    settings = {
        "train": (MixtureItem(dataset="boxes"),),
        "augment": LargeScaleJitter(size=32, min_scale=0.5, max_scale=1.5),
        "workers": 0,
        "chunk_mb": 0.02,
        "lanes": 4,
        "window": 8,
    }
    return DataConfig(**{**settings, **changes})


def spec(rank=0, world=1, start_step=0, global_batch=6, micro_batch=2, pin=False):
    return LoaderSpec(
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        start_step=start_step,
        seed=3,
        pin=pin,
    )


def load_steps(manifests, data, steps, storage=None, **changes):
    """Return `steps` steps of one rank, and close the loader."""
    manifests = list(manifests)
    data = replace(data, train=data.train[:1] * len(manifests)) if len(data.train) == 1 else data
    order = build_order(manifests, 3, data)
    loader = build_loader(manifests, order, data, storage or Storage(StorageConfig()), spec(**changes))
    try:
        return list(itertools.islice(loader, steps))
    finally:
        loader.close()


def pixels_by_position(steps):
    """Return {position: (key, pixels, id maps, labels, size)}.

    Fillers are checked to have weight 0 and the pixels of the step's first image, which trained BatchNorms count.
    """
    samples = {}
    for step in steps:
        for batch in step.micro_batches:
            for row, position in enumerate(batch.targets.position.tolist()):
                if position < 0:
                    assert batch.targets.weight[row] == 0
                    first = step.micro_batches[0]
                    assert not step.positions or torch.equal(batch.images[row], first.images[0])
                    assert torch.equal(batch.sizes[row], first.sizes[0])
                    continue
                assert position not in samples
                ids, valid = batch.targets.id_maps[row], batch.targets.valid[row]
                samples[position] = (
                    batch.keys[row],
                    batch.images[row].numpy().tobytes(),
                    ids.numpy().tobytes(),
                    batch.targets.labels[row][valid].tolist(),
                    batch.sizes[row].tolist(),
                )
    return samples


def test_pixels_depend_only_on_the_position(boxes):
    """World size, micro-batch, worker count and start step do not change the pixels at a position."""
    data = data_config()
    reference = pixels_by_position(load_steps([boxes], data, 8))
    assert sorted(reference) == list(range(48))
    for world, micro_batch in [(2, 3), (4, 1), (5, 2)]:
        samples = {}
        for rank in range(world):
            samples |= pixels_by_position(load_steps([boxes], data, 8, rank=rank, world=world, micro_batch=micro_batch))
        assert samples == reference
    resumed = pixels_by_position(load_steps([boxes], data, 3, start_step=5))
    assert resumed == {p: v for p, v in reference.items() if p >= 30}
    with_workers = pixels_by_position(load_steps([boxes], data_config(workers=2), 8))
    assert with_workers == reference


@pytest.mark.parametrize(("workers", "thread"), [(0, "prepare"), (1, "_pin_memory_loop")])
def test_loader_thread_pins_batches(boxes, monkeypatch, workers, thread):
    """The accelerator is faked, and pin_memory clones the tensor."""
    pinned_by = []

    def pin(tensor):
        pinned_by.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    data = data_config(workers=workers)
    unpinned = pixels_by_position(load_steps([boxes], data, 2))
    assert not pinned_by
    assert pixels_by_position(load_steps([boxes], data, 2, pin=True)) == unpinned
    assert len(pinned_by) >= 2 * 3 * 10  # a micro-batch has ten tensors
    assert all(thread in name for name in pinned_by)


def test_pinning_loader_yields_raw_batches_as_tuples(monkeypatch):
    """Older versions of torch convert tuples to lists when they pin a result."""

    class Loader(list):
        def __init__(self, dataset, **options):
            assert options["pin_memory"]
            super().__init__([[None, "a raw example"], "a batch"])

    monkeypatch.setattr(m2f.data_pipeline.loading.loader, "DataLoader", Loader)
    results = list(m2f.data_pipeline.loading.loader._results(None, iter(()), workers=1, ahead=1, pin=True))
    assert results == [(None, "a raw example"), "a batch"]


def test_changing_the_world_size_neither_skips_nor_repeats_samples(boxes, tmp_path):
    """Six attempts with different world sizes, some with fillers, read the same 2.5 epochs as a single run."""
    second = write_boxes(tmp_path / "more", count=15, prefix="more")
    manifests, data, batch = [boxes, second], weighted(4.0, 1.0), 12
    reference = pixels_by_position(load_steps(manifests, data, 16, global_batch=batch, micro_batch=6))
    samples, step = {}, 0
    for world, steps in [(8, 3), (6, 2), (4, 3), (1, 2), (3, 3), (16, 3)]:
        for rank in range(world):
            rank_steps = load_steps(manifests, data, steps, rank=rank, world=world, start_step=step, global_batch=batch)
            rank_samples = pixels_by_position(rank_steps)
            assert not rank_samples.keys() & samples.keys()
            samples |= rank_samples
        step += steps
    assert samples == reference
    assert sorted(samples) == list(range(16 * batch))
    boxes_seen = [samples[p][0] for p in sorted(samples) if samples[p][0].startswith("box")]
    for epoch in range(3):
        assert len(set(boxes_seen[epoch * 48 : (epoch + 1) * 48])) == 48


def test_an_epoch_shows_every_annotated_image_once(boxes):
    steps = load_steps([boxes], data_config(), 16)
    keys = [key for step in steps for batch in step.micro_batches for key in batch.keys]
    annotated = {f"box_{i:04d}" for i in range(60) if i % 5 != 4}
    assert set(keys[:48]) == annotated
    assert set(keys[48:96]) == annotated
    assert keys[:48] != keys[48:96]


def test_step_batches_contain_their_step_and_positions(boxes):
    first, second = load_steps([boxes], data_config(), 2, rank=1, world=4)
    assert (first.step, first.positions) == (0, (1, 5))
    assert (second.step, second.positions) == (1, (9,))
    assert len(first.micro_batches) == len(second.micro_batches) == 1
    assert first.wait_s >= 0


def test_images_without_targets_can_be_kept(boxes):
    data = data_config(skip_images_without_targets=False)
    keys = {k for s in load_steps([boxes], data, 10) for b in s.micro_batches for k in b.keys}
    assert len(keys) == 60


def weighted(*weights):
    return data_config(train=tuple(MixtureItem(dataset="boxes", weight=weight) for weight in weights))


def test_mixture_samples_data_sets_by_weight(boxes, tmp_path):
    second = write_boxes(tmp_path / "more", count=20, prefix="more")
    order = build_order([boxes, second], 3, weighted(3.0, 1.0))
    refs = [order.at(p) for p in range(400)]
    assert sum(p.dataset == 1 for p in refs) == 100
    assert order.fingerprint != build_order([boxes, second], 3, weighted(1.0, 1.0)).fingerprint
    assert order.fingerprint == build_order([boxes, second], 3, weighted(6.0, 2.0)).fingerprint
    steps = load_steps([boxes, second], weighted(1.0, 1.0), 6)
    batches = [batch for step in steps for batch in step.micro_batches]
    found = {(d, k[:3]) for b in batches for d, k in zip(b.targets.dataset.tolist(), b.keys, strict=True)}
    assert found == {(0, "box"), (1, "mor")}


def test_fingerprint_changes_with_every_setting_that_moves_samples(boxes):
    base = build_order([boxes], 3, data_config()).fingerprint
    assert base == build_order([boxes], 3, data_config(workers=7)).fingerprint
    assert base == build_order([boxes], 3, weighted(2.0)).fingerprint
    assert base != build_order([boxes], 4, data_config()).fingerprint
    assert base != build_order([replace(boxes, fingerprint="other")], 3, data_config()).fingerprint
    for change in ({"lanes": 5}, {"window": 9}, {"chunk_mb": 0.01}, {"skip_images_without_targets": False}):
        assert base != build_order([boxes], 3, data_config(**change)).fingerprint


def test_data_sets_of_a_mixture_keep_their_own_ids(boxes, tmp_path):
    """The second set has the same classes with other ids and in another order. It gets the labels of the first."""
    swapped = CategoryTable((Category(7, "box", True, (0, 0, 9)), Category(2, "ground", False, (9, 0, 0))))
    other = write_boxes(tmp_path / "other", count=20, prefix="more", categories=swapped)
    assert mixture_labels([boxes, other], "panoptic") == [{1: 0, 4: 1}, {7: 1, 2: 0}]
    assert mixture_labels([other, boxes], "instance") == [{7: 0}, {4: 0}]
    samples = pixels_by_position(load_steps([boxes, other], weighted(1.0, 1.0), 8))
    things = {key[:3]: set(labels) for key, _, _, labels, _ in samples.values() if len(labels) == 2}
    assert things == {"box": {0, 1}, "mor": {0, 1}}


def test_repeated_names_of_a_mixture_keep_their_order(boxes):
    door, wall = Category(1, "door", False, (0, 0, 0)), Category(2, "wall", False, (0, 9, 0))
    doors = (door, wall, replace(door, id=3))
    first, same, one = (
        replace(boxes, categories=CategoryTable(table))
        for table in (doors, tuple(replace(c, id=c.id + 10) for c in doors), (door,))
    )
    assert mixture_labels([first, same], "semantic") == [{1: 0, 2: 1, 3: 2}, {11: 0, 12: 1, 13: 2}]
    assert mixture_labels([first, replace(boxes, categories=CategoryTable((wall,)))], "semantic")[1] == {2: 1}
    with pytest.raises(DataError, match="several classes named 'door'"):
        mixture_labels([first, one], "semantic")


def test_mixture_with_an_unknown_class_is_refused(boxes, tmp_path):
    table = CategoryTable((*TABLE.categories, Category(9, "sky", False, (0, 0, 255))))
    other = write_boxes(tmp_path / "other", count=5, categories=table)
    with pytest.raises(DataError) as error:
        load_steps([boxes, other], data_config(), 1)
    assert boxes.url in str(error.value)
    assert other.url in str(error.value)
    assert "does not have ['sky']" in str(error.value)


def test_a_data_set_without_targets_is_refused(boxes, tmp_path):
    table = CategoryTable((Category(1, "ground", False, (0, 90, 0)), Category(4, "box", False, (200, 0, 0))))
    stuff = replace(boxes, categories=table)
    with pytest.raises(DataError, match="none of its 60 images has a target for task 'instance'"):
        build_order([stuff], 0, data_config(task="instance"))


def damage(manifest, index):
    """Flip one byte in the middle of a sample."""
    path = Path(manifest.shard_url(int(manifest.shard[index])))
    data = bytearray(path.read_bytes())
    data[int(manifest.offset[index]) + int(manifest.length[index]) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_flipped_byte_raises_error_naming_the_sample(tmp_path, workers):
    manifest = write_boxes(tmp_path / "set", count=12)
    index = list(manifest.key).index("box_0006")
    damage(manifest, index)
    with pytest.raises(DataError, match=rf"'box_0006'.*\.tar at byte {manifest.offset[index]}\b"):
        load_steps([manifest], data_config(workers=workers), 10)


class FlakyStorage(Storage):
    """Storage that returns damaged bytes for the first `faults` reads."""

    def __init__(self, faults):
        super().__init__(StorageConfig())
        self.faults = faults
        self.ranges = []

    def get_range(self, url, offset, length, etag=None):
        data = super().get_range(url, offset, length, etag)
        self.ranges.append((url, offset, length))
        if self.faults:
            self.faults -= 1
            return data[: length // 2] + bytes([data[length // 2] ^ 1]) + data[length // 2 + 1 :]
        return data


def test_data_damaged_in_transit_is_read_again(boxes):
    reference = pixels_by_position(load_steps([boxes], data_config(), 4))
    storage = FlakyStorage(faults=3)
    assert pixels_by_position(load_steps([boxes], data_config(), 4, storage=storage)) == reference
    assert storage.faults == 0


def test_missing_shard_raises_error(tmp_path):
    manifest = write_boxes(tmp_path / "set", count=12)
    Path(manifest.shard_url(0)).unlink()
    with pytest.raises(StorageError, match=r"00000\.tar"):
        load_steps([manifest], data_config(), 10)


def fetcher_for(manifest, groups, storage, **limits):
    chunks = group_chunks(manifest.shard, manifest.offset, 20_000)
    return chunks, SampleFetcher([manifest], [chunks], storage, iter(groups), FetchLimits(**limits))


def test_every_chunk_is_read_once_within_the_look_ahead(boxes):
    data, storage = data_config(), FlakyStorage(faults=0)
    order = build_order([boxes], 3, data)
    groups = [tuple(order.at(p) for p in range(k, k + 4)) for k in range(0, 48, 4)]
    chunks, fetcher = fetcher_for(boxes, groups, storage, groups_ahead=2, horizon=12)
    assert len(list(fetcher)) == 12
    fetcher.close()
    assert len(storage.ranges) == len(chunks.shard)
    assert not fetcher._held


def test_reads_cover_only_the_span_of_needed_samples(boxes):
    storage = FlakyStorage(faults=0)
    groups = [(SampleRef(0, 0, 0),), (SampleRef(0, 0, 2),)]
    chunks, fetcher = fetcher_for(boxes, groups, storage, groups_ahead=1, horizon=2)
    assert chunks.members(0).tolist()[:3] == [0, 1, 2]
    assert [sample.members for (sample,) in fetcher] == [boxes.read_members(row, Storage()) for row in (0, 2)]
    fetcher.close()
    assert storage.ranges == [(boxes.shard_url(0), 0, boxes.offset[2] + boxes.length[2])]


def test_small_memory_limit_rereads_samples_with_the_same_bytes(boxes):
    data = data_config()
    order = build_order([boxes], 3, data)
    groups = [(order.at(p), None) for p in range(96)]
    storage = FlakyStorage(faults=0)
    chunks, fetcher = fetcher_for(boxes, groups, storage, groups_ahead=3, horizon=96, max_bytes=30_000)
    for (ref, _), (sample, filler) in zip(groups, fetcher, strict=True):
        assert filler is None
        assert sample.ref == ref
        assert sample.members == boxes.read_members(ref.index, storage)
        assert fetcher._held_bytes <= 30_000
    fetcher.close()
    assert len(storage.ranges) > len(chunks.shard)


def test_evaluation_batches_are_the_given_images_in_order(boxes):
    groups = [(5, 4, 40), (41, 42, 0), (4,)]
    storage = Storage(StorageConfig())
    batches = list(eval_batches(boxes, groups, storage, shortest_edge=48, max_size=64))
    assert [b.indices for b in batches] == groups
    assert list(eval_batches(boxes, [], storage, shortest_edge=48, max_size=64)) == []
    for batch in batches:
        for image, (h, w), index, sample in zip(batch.images, batch.sizes, batch.indices, batch.samples, strict=True):
            truth = boxes.read_sample(index, storage)
            assert sample.key == boxes.key[index]
            np.testing.assert_array_equal(sample.image, truth.image)
            np.testing.assert_array_equal(sample.annotation.seg, truth.annotation.seg)
            assert image[:, :h, :w].shape[1:] == (h, w)
            assert image.shape[1] % 32 == image.shape[2] % 32 == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padding_of_an_image_does_not_depend_on_its_batch(boxes, batch_size):
    sizes = [(30, 40), (40, 30), (31, 40), (30, 80), (40, 31), (30, 41), (64, 64)]
    height, width = np.array([sizes[i % len(sizes)] for i in range(boxes.num_samples)]).T
    manifest = replace(boxes, height=height, width=width)
    indices = list(range(20, 0, -1))
    groups = eval_groups(manifest, indices, batch_size=batch_size, shortest_edge=48, max_size=100)
    assert sorted(index for group in groups for index in group) == sorted(indices)
    assert [group[0] for group in groups] == sorted((group[0] for group in groups), reverse=True)
    assert max(map(len, groups)) == batch_size
    for group in groups:
        padded = {padded_eval_size((height[i], width[i]), 48, 100) for i in group}
        assert len(padded) == 1
    if batch_size == 1:
        assert groups == [(index,) for index in indices]


def test_loading_does_not_advance_the_global_torch_generator(boxes):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_steps([boxes], data_config(workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def open_loader(manifest, workers):
    data = data_config(workers=workers)
    order = build_order([manifest], 3, data)
    return build_loader([manifest], order, data, Storage(StorageConfig()), spec())


@pytest.mark.parametrize("workers", [0, 2])
def test_close_leaves_no_process_or_thread(boxes, workers):
    loader = open_loader(boxes, workers)
    next(loader)
    assert len(multiprocessing.active_children()) == workers
    loader.close()
    wait_until(lambda: not leftovers(), what=lambda: f"the end of {leftovers()}")


def leftovers():
    threads = [t.name for t in threading.enumerate() if t.name.startswith(("fetch", "prepare", "QueueFeeder"))]
    return multiprocessing.active_children() + threads


def test_worker_outlives_ctrl_c_and_a_killed_one_raises_error_instead_of_hanging(boxes):
    next(loader := open_loader(boxes, workers=1))
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)  # by a terminal; the run needs its loader until its checkpoint
    assert len(list(itertools.islice(loader, 20))) == 20
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LoaderDiedError, match=r"a loader process died .*data\.workers"):
        list(itertools.islice(loader, 20))


@pytest.mark.slow
def test_workers_exit_when_training_is_killed():
    environment = os.environ | {"PYTHONPATH": str(Path(m2f.__file__).parents[1])}
    command = [sys.executable, str(Path(__file__).with_name("training_main.py"))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as training:
        workers = [psutil.Process(int(pid)) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        training.kill()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_shards_in_s3_give_the_same_pixels(boxes, s3_endpoint):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint, region="us-east-1"))
    remote = write_boxes("s3://box/boxes", storage=storage)
    assert remote.fingerprint == boxes.fingerprint
    found = pixels_by_position(load_steps([remote], data_config(), 4, storage=storage))
    assert found == pixels_by_position(load_steps([boxes], data_config(), 4))
