"""Benchmarks of the data pipeline, from shards to batches of 1024 x 1024 pixels, and of the start-up of a rank.

- Stages and their sum: CPU time per image, against a mapper in the style of Detectron2 (Pillow, whole images, one mask
  per segment) on the same files with the same random numbers. `exact` is our mode that reproduces the official pixels;
  they must equal the peer's.
- Reading, from local files and from an S3 server on loopback in a separate process: against `webdataset`, which reads
  tars from front to back.
- Start-up: opening a manifest and choosing the first images, against parsing the panoptic JSON of the same set.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import boto3
import numpy as np
import torch

from benchmarks.measure import Measurement, time_interleaved
from benchmarks.peers import data_peers as peer
from benchmarks.synthetic_images import SIZE, TABLE, SyntheticImage, make_image, write_images, write_long_manifest
from m2f.data_pipeline.config import DataConfig, LargeScaleJitter, MixtureItem, StorageConfig
from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.fetch import FetchLimits, Members, SampleFetcher
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import build_order, chunk_bytes
from m2f.data_pipeline.randomness import Stream, sample_rng
from m2f.data_pipeline.sample import DecodedSample
from m2f.data_pipeline.shards.codec import decode
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.augment import AugmentParams, draw_params
from m2f.data_pipeline.transforms.collate import Batch, collate
from m2f.data_pipeline.transforms.example import Example, TrainTransform, make_example

T = TypeVar("T")

SEED = 0
"""Seed of the order and of the augmentation of all cases."""
BATCH = 2
"""Images per batch, as on each of eight GPUs in the paper."""
EPOCHS = 4
"""Times that the shards are read, so that a measurement has enough images."""
AREA_AUGMENT = LargeScaleJitter(size=1024)
EXACT_AUGMENT = LargeScaleJitter(size=1024, shrink="bilinear")
DATA = DataConfig(train=(MixtureItem(dataset="images"),), augment=AREA_AUGMENT, workers=0, lanes=12, window=32)
MAPPER = "Detectron2 style"
SHAPE = "640x480 to 1024x1024"
_SERVER_START_S = 30.0
"""Longest wait in seconds for the S3 server to listen."""


def run(tiny: bool) -> list[Measurement]:
    """Measure stages, reading and start-up. Times are in milliseconds per image, except for the start-up."""
    count, repeats = (12, 3) if tiny else (96, 7)
    images = [make_image(index) for index in range(count)]
    with tempfile.TemporaryDirectory() as folder, _s3_server() as s3:
        manifest = write_images(images, f"{folder}/images", Storage())
        results = [*_stages(_inputs(images, manifest), repeats), _reading(manifest, repeats)]
        results += _streaming(write_images(images, "s3://bench/images", s3), s3, repeats)
        return [*results, _start_up(manifest, Path(folder), 10_000 if tiny else 118_000, repeats)]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of all stages, in the order of the manifest."""

    images: list[SyntheticImage]
    members: list[Members]
    samples: list[DecodedSample]
    params: list[AugmentParams]


def _inputs(images: list[SyntheticImage], manifest: Manifest) -> _Inputs:
    by_name = {image.name: image for image in images}
    members = [manifest.read_members(row, Storage()) for row in range(manifest.num_samples)]
    rngs = [sample_rng(SEED, position, Stream.AUGMENT) for position in range(len(images))]
    return _Inputs(
        images=[by_name[key] for key in manifest.key],
        members=members,
        samples=[decode(member) for member in members],
        params=[draw_params(rng, SIZE, AREA_AUGMENT) for rng in rngs],
    )


def _stages(inputs: _Inputs, repeats: int) -> list[Measurement]:
    pixels = [peer.decode(image) for image in inputs.images]
    examples, mapped = _augment(inputs.samples, AREA_AUGMENT), _map(inputs, pixels)
    decoders = _decoding_error(inputs, pixels)
    area = max(_area_error(*pair) for pair in zip(examples, mapped, strict=True))
    exact = max(_exact_error(*pair) for pair in zip(_augment(inputs.samples, EXACT_AUGMENT), mapped, strict=True))
    assert decoders <= 1 / 255, f"the JPEG decoders differ by {255 * decoders:.0f} grey levels"
    assert exact <= decoders, "the exact mode differs from the peer by more than the decoders differ"
    assert area < 0.01, f"a segment differs by {area:.1%} of its image"

    def measure(case: str, error: float, ours: Callable[[], object], theirs: Callable[[], object]) -> Measurement:
        return _measure(case, SHAPE, error, ours, MAPPER, theirs, len(inputs.images), repeats)

    def file_to_batch(config: LargeScaleJitter) -> list[Batch]:
        return _collate(_augment(map(decode, inputs.members), config))

    def peer_file_to_batch() -> object:
        return _collate_peer(_map(inputs, map(peer.decode, inputs.images)))

    return [
        measure("decode", decoders, lambda: list(map(decode, inputs.members)), lambda: _decode_peer(inputs)),
        measure("augment", area, lambda: _augment(inputs.samples, AREA_AUGMENT), lambda: _map(inputs, pixels)),
        measure("augment, exact", exact, lambda: _augment(inputs.samples, EXACT_AUGMENT), lambda: _map(inputs, pixels)),
        measure("collate", area, lambda: _collate(examples), lambda: _collate_peer(mapped)),
        measure("file to batch", area, lambda: file_to_batch(AREA_AUGMENT), peer_file_to_batch),
        measure("file to batch, exact", exact, lambda: file_to_batch(EXACT_AUGMENT), peer_file_to_batch),
    ]


def _reading(manifest: Manifest, repeats: int) -> Measurement:
    """Compare reading local tars: ours at random positions with checksums, the peer from front to back."""
    urls = [manifest.shard_url(shard) for shard in range(len(manifest.shards))]
    order = build_order([manifest], SEED, DATA)
    chunks = group_chunks(manifest.shard, manifest.offset, chunk_bytes(DATA))

    def ours() -> list[bytes]:
        groups = ((order.at(position),) for position in range(manifest.num_samples))
        limits = FetchLimits(groups_ahead=4, horizon=manifest.num_samples)
        with closing(SampleFetcher([manifest], [chunks], Storage(), groups, limits)) as fetcher:
            members_by_image = [sample.members for (sample,) in fetcher if sample is not None]
            return [members["img.jpg"] for members in members_by_image if not isinstance(members, DataError)]

    def theirs() -> list[bytes]:
        return [sample["img.jpg"] for sample in peer.stream(urls)]

    assert sorted(ours()) == sorted(theirs()), "not the same images"
    return _measure("fetch, local", "shuffled globally", 0.0, ours, "webdataset", theirs, manifest.num_samples, repeats)


def _streaming(manifest: Manifest, storage: Storage, repeats: int) -> list[Measurement]:
    """Compare the pipeline from S3 to batches; both sides decode and augment with our code.

    Several epochs are read, because the batches that our loader starts but does not finish should hardly count.
    """
    urls = EPOCHS * [manifest.shard_url(shard) for shard in range(len(manifest.shards))]
    count = EPOCHS * manifest.num_samples
    order = build_order([manifest], SEED, DATA)
    spec = LoaderSpec(global_batch=BATCH, micro_batch=BATCH, rank=0, world=1, start_step=0, seed=SEED)

    def ours() -> list[str]:
        with closing(build_loader([manifest], order, DATA, storage, spec)) as loader:
            steps = itertools.islice(loader, count // BATCH)
            return [key for step in steps for batch in step.micro_batches for key in batch.keys]

    def theirs() -> list[str]:
        transform, keys = _transform(AREA_AUGMENT), []
        for pair in _pairs(enumerate(peer.stream(urls, storage))):
            keys += collate([make_example(decode(member), 0, n, transform) for n, member in pair], (1024, 1024)).keys
        return keys

    assert sorted(ours()) == sorted(theirs()), "not the same images"
    return [
        _measure(f"S3 to batch, {name}", "shuffled globally", 0.0, ours, "webdataset", theirs, count, repeats, clock)
        for name, clock in (("CPU time", time.process_time), ("elapsed", time.perf_counter))
    ]


def _start_up(small: Manifest, folder: Path, count: int, repeats: int) -> Measurement:
    """Compare the start of a rank, up to the choice of its first images, with parsing the panoptic JSON of the set."""
    write_long_manifest(small, folder / "long", count, Storage())
    json_path = folder / "panoptic.json"
    json_path.write_text(json.dumps(_panoptic_json(count)))

    def ours() -> object:
        return _first_images(str(folder / "long"))

    def theirs() -> object:
        return {entry["image_id"]: entry for entry in json.loads(json_path.read_bytes())["annotations"]}

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        growth = pool.submit(_memory_growth, str(folder / "long")).result()
    shape = f"{count:,} images, {growth / 1e6:.0f} MB"
    return _measure("start-up of a rank", shape, 0.0, ours, "JSON per rank", theirs, 1, repeats)


def _first_images(url: str) -> object:
    manifest = Manifest.load(url, Storage())
    order = build_order([manifest], SEED, replace(DATA, lanes=192))
    group_chunks(manifest.shard, manifest.offset, chunk_bytes(DATA))
    return manifest, order, order.refs(0, 64)


def _memory_growth(url: str) -> int:
    """Return the peak growth in bytes of a fresh process when it opens the data set."""
    _first_images(_small_dataset_url(url))  # excludes one-time allocations of libraries
    before = _status("VmRSS")
    kept = _first_images(url)
    return max(0, _status("VmHWM") - before) if kept else 0


def _small_dataset_url(url: str) -> str:
    return str(Path(url).parent / "images")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _panoptic_json(count: int) -> dict[str, object]:
    segments = [
        {"id": 3_226_956 + n, "category_id": 1 + n, "iscrowd": 0, "bbox": [100, 120, 140 + n, 90], "area": 8000 + n}
        for n in range(11)
    ]
    return {
        "annotations": [{"segments_info": segments, "file_name": f"{n:012d}.png", "image_id": n} for n in range(count)]
    }


def _transform(config: LargeScaleJitter) -> TrainTransform:
    return TrainTransform("panoptic", TABLE.labels("panoptic"), config, drop_empty_targets=True, seed=SEED)


def _augment(samples: Iterable[DecodedSample], config: LargeScaleJitter) -> list[Example]:
    transform = _transform(config)
    return [make_example(sample, 0, position, transform) for position, sample in enumerate(samples)]


def _collate(examples: Sequence[Example]) -> list[Batch]:
    return [collate(pair, (1024, 1024)) for pair in _pairs(examples)]


def _pairs(values: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(values)
    while pair := list(itertools.islice(remaining, BATCH)):
        yield pair


def _decode_peer(inputs: _Inputs) -> list[peer.Pixels]:
    return [peer.decode(image) for image in inputs.images]


def _map(inputs: _Inputs, pixels: Iterable[peer.Pixels]) -> list[peer.Mapped]:
    return [
        peer.map_image(image, *one, params)
        for image, one, params in zip(inputs.images, pixels, inputs.params, strict=True)
    ]


def _collate_peer(mapped: Sequence[peer.Mapped]) -> list[object]:
    return [peer.collate(pair) for pair in _pairs(mapped)]


def _decoding_error(inputs: _Inputs, pixels: Sequence[peer.Pixels]) -> float:
    """Return the largest pixel difference of the decoded images, in [0, 1]; assert that segments are equal."""
    max_error = 0.0
    for sample, encoded, (image, colors) in zip(inputs.samples, inputs.images, pixels, strict=True):
        ids = peer.segment_ids(colors)
        assert sample.annotation.seg is not None
        for segment in encoded.annotation.segments:
            assert np.array_equal(sample.annotation.seg == segment.id, ids == segment.source_id)
        max_error = max(max_error, np.abs(sample.image.astype(int) - image).max() / 255)
    return max_error


def _exact_error(ours: Example, theirs: peer.Mapped) -> float:
    """Return the largest pixel difference of the images, in [0, 1]; assert that masks are equal."""
    masks = theirs.masks[theirs.masks.any(dim=(1, 2))]
    our_masks = ours.targets.id_maps[0] == ours.targets.local_id[:, None, None]
    assert torch.equal(masks, torch.from_numpy(our_masks)), "masks of the exact mode differ from the peer's"
    return float(np.abs(ours.image.transpose(2, 0, 1).astype(int) - theirs.image.numpy()).max()) / 255


def _area_error(ours: Example, theirs: peer.Mapped) -> float:
    """Return the largest difference between areas of a segment, as a share of the image area."""
    areas = {int(n): int((ours.targets.id_maps[0] == n).sum()) for n in ours.targets.local_id}
    return max(abs(areas.get(n, 0) - int(mask.sum())) / mask.numel() for n, mask in enumerate(theirs.masks, start=1))


def _measure(
    case: str,
    shape: str,
    error: float,
    ours: Callable[[], object],
    name: str,
    theirs: Callable[[], object],
    count: int,
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> Measurement:
    our_times, peer_times = time_interleaved(ours, theirs, repeats, clock)
    return Measurement(case, shape, our_times.per(count), name, peer_times.per(count), error)


@contextlib.contextmanager
def _s3_server() -> Iterator[Storage]:
    """Run moto's S3 server on a free loopback port, with an empty bucket `bench`."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        config = StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")
        _wait_for(port)
        boto3.client("s3", endpoint_url=config.endpoint_url, region_name=config.region).create_bucket(Bucket="bench")
        yield Storage(config)
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _SERVER_START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
