"""Faults between shards and loader: every sample is delivered exactly once, or an error states the cause."""

import hashlib
import itertools
import logging
import random
import shutil
import socketserver
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from m2f.data_pipeline.config import (
    CacheConfig,
    DataConfig,
    DatasetConfig,
    LargeScaleJitter,
    MixtureItem,
    StorageConfig,
)
from m2f.data_pipeline.errors import DataError, StorageError
from m2f.data_pipeline.loading import fetch
from m2f.data_pipeline.loading.fetch import FetchLimits, SampleFetcher
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.chunks import group_chunks
from m2f.data_pipeline.order.order import SampleRef, build_order
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage import s3 as s3_store
from m2f.data_pipeline.storage.storage import Storage
from tests.waiting import PATIENCE_S, wait_until

IMAGES = 24


class FaultyS3(socketserver.ThreadingTCPServer):
    """S3 server of a folder with ETags and If-Match. `fault(number, attempt)` names the fault of a ranged GET."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault, self.ranges, self.numbers = (
            Path(folder),
            lambda number, attempt: "",
            [],
            itertools.count(),
        )
        self.request_counts: Counter[tuple[str, str]] = Counter()
        self.flipped: set[tuple[str, int]] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        """Print no traceback: these tests expect clients to disconnect."""

    @property
    def storage(self):
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return Storage(StorageConfig(endpoint_url=url, region="us-east-1", read_timeout_s=2.0))


class _Handler(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.respond(None)

    def do_GET(self):
        if "Range" not in self.headers:
            self.respond("")
            return
        request = (self.path, self.headers["Range"])
        self.server.request_counts[request] += 1
        self.respond(self.server.fault(next(self.server.numbers), self.server.request_counts[request] - 1))

    def respond(self, fault):
        path = self.server.folder / self.path.split("?")[0].split("/", 2)[2]
        if not path.is_file() or (fault or "").isdigit():
            self.send_empty(int(fault) if (fault or "").isdigit() else 404)
            return
        content = path.read_bytes()
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            self.send_empty(412)
            return
        body, is_range = content, "Range" in self.headers
        if is_range:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = content[first : last + 1]
            self.server.ranges.append((path.name, first, last))
        self.send_response(206 if is_range else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        if is_range:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if fault == "slow":
            threading.Event().wait(0.3)
        self.end_headers()
        if fault == "flip" and is_range:
            body = self.flip(body, path.name, first)
        if fault is not None:
            self.send_body(body, fault)

    def flip(self, body, name, first):
        """Return `body` with one bit flipped. Ranges with an earlier flip stay unchanged, so a retry succeeds."""
        flipped, index = self.server.flipped, len(body) // 3
        if any((name, first + offset) in flipped for offset in range(len(body))):
            return body
        flipped.add((name, first + index))
        return body[:index] + bytes([body[index] ^ 4]) + body[index + 1 :]

    def send_body(self, body, fault):
        if fault in ("cut", "reset"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "reset":
                self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER 0: close() sends a reset
            self.close_connection = True
            return
        self.wfile.write(body)

    def send_empty(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch):
    monkeypatch.setattr(s3_store, "_BACKOFF_BASE_S", 0.001)
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    """Return the folder of an intact data set."""
    folder = tmp_path_factory.mktemp("written")
    source = SyntheticSource(num_images=IMAGES, seed=8)
    config = DatasetConfig(shards=str(folder), source=source, shard_mb=0.15)
    write_dataset(open_reader(source), config, Storage())
    return folder


@pytest.fixture
def s3_server(dataset_folder, tmp_path):
    """Return a server of a copy of the data set, which tests may damage."""
    shutil.copytree(dataset_folder, tmp_path / "objects" / "set")
    with FaultyS3(tmp_path / "objects") as server:
        yield server
        server.shutdown()


URL = "s3://bucket/set"
MAX_FAULTS_PER_REQUEST = 3
"""Upper limit of transient faults per request. The storage retries more often than this."""
SETTINGS = DataConfig(
    train=(MixtureItem(dataset="set"),),
    augment=LargeScaleJitter(size=32),
    workers=0,
    chunk_mb=0.05,
    lanes=4,
    window=4,
)


def load_samples(storage, url=URL, data=SETTINGS, steps=2 * IMAGES // 6, rank=0, world=1, start_step=0):
    """Return the samples of one rank as {position: (key, pixels)}, and the substitutions."""
    manifest = Manifest.load(url, storage)
    order = build_order([manifest], 1, data)
    spec = LoaderSpec(global_batch=6, micro_batch=3, rank=rank, world=world, start_step=start_step, seed=1)
    samples, substitutions = {}, []
    loader = build_loader([manifest], order, data, storage, spec)
    try:
        for step in itertools.islice(loader, steps):
            substitutions += step.substitutions
            for batch in step.micro_batches:
                for row, position in enumerate(batch.targets.position.tolist()):
                    if position >= 0:
                        assert position not in samples
                        samples[position] = (batch.keys[row], batch.images[row].numpy().tobytes())
    finally:
        loader.close()
    return samples, substitutions


@pytest.fixture(scope="module")
def reference(dataset_folder):
    """Return the samples of two epochs, read from local files without faults."""
    samples, _ = load_samples(Storage(), str(dataset_folder))
    assert len(samples) == 2 * IMAGES
    for epoch in range(2):
        assert len({samples[p][0] for p in range(epoch * IMAGES, (epoch + 1) * IMAGES)}) == IMAGES
    return samples


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "cut", "flip", "slow"])
def test_transient_faults_do_not_change_the_batches(s3_server, reference, fault):
    s3_server.fault = lambda number, attempt: fault if number % 3 == 1 and attempt < MAX_FAULTS_PER_REQUEST else ""
    storage = s3_server.storage
    assert load_samples(storage)[0] == reference
    if fault not in ("flip", "slow"):
        assert storage.counters.retries > 0


def mixed_faults(seed, rate):
    rng = random.Random(seed)
    kinds = ["503", "500", "reset", "cut", "flip"]
    return lambda number, attempt: rng.choice(kinds) if rng.random() < rate and attempt < MAX_FAULTS_PER_REQUEST else ""


@pytest.mark.parametrize("cached", [False, True])
def test_mixed_faults_do_not_change_the_batches(s3_server, reference, tmp_path, cached):
    s3_server.fault = mixed_faults(3, rate=0.25)
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_gb=1e-3) if cached else None
    assert load_samples(s3_server.storage, data=replace(SETTINGS, cache=cache))[0] == reference


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_seeds_of_mixed_faults_do_not_change_the_batches(s3_server, reference, tmp_path, seed):
    s3_server.fault = mixed_faults(seed, rate=0.35)
    size = (1e-3, 1e-4)[seed % 2]
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_gb=size) if seed % 3 else None
    samples = {}
    for rank in range(1 + seed % 4):
        samples |= load_samples(s3_server.storage, data=replace(SETTINGS, cache=cache), rank=rank, world=1 + seed % 4)[
            0
        ]
    assert samples == reference


@pytest.mark.parametrize(
    ("fault", "message"),
    [("403", r"access is denied \(403"), ("404", "does not exist"), ("503", r"longer than storage\.patience_s")],
)
def test_permanent_faults_raise_error_with_the_reason(s3_server, fault, message):
    s3_server.fault = lambda number, attempt: fault if number > 3 else ""
    storage = Storage(replace(s3_server.storage.config, patience_s=0.5))
    with pytest.raises(StorageError, match=rf"s3://bucket/set/shards/.*tar.*{message}"):
        load_samples(storage)


def test_close_stops_reads_that_wait_for_the_store(s3_server):
    """Threads that kept waiting would keep the process alive for storage.patience_s."""
    manifest = Manifest.load(URL, s3_server.storage)
    groups = iter([(SampleRef(0, 0, 0),)])
    limits = FetchLimits(groups_ahead=0, horizon=1)
    s3_server.fault = lambda number, attempt: "503"
    fetcher = SampleFetcher(
        [manifest], [group_chunks(manifest.shard, manifest.offset, 1 << 20)], s3_server.storage, groups, limits
    )
    with ThreadPoolExecutor(1) as consumer:
        pending = consumer.submit(next, fetcher)
        wait_until(lambda: s3_server.request_counts, what="the first read")
        fetcher.close()
        with pytest.raises(StorageError, match=r"00000\.tar: reading was stopped while waiting for the store"):
            pending.result(PATIENCE_S)


def test_truncated_object_raises_error_with_both_sizes(s3_server):
    path = s3_server.folder / "set" / "shards" / "00001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(StorageError, match=rf"00001\.tar has {size - 1024} bytes, but its manifest says {size}:"):
        load_samples(s3_server.storage)


def test_missing_object_raises_error_with_its_url(s3_server):
    (s3_server.folder / "set" / "shards" / "00001.tar").unlink()
    with pytest.raises(StorageError, match=r"s3://bucket/set/shards/00001\.tar.*does not exist"):
        load_samples(s3_server.storage)


def test_object_replaced_while_being_read_raises_error(s3_server, monkeypatch):
    """The shards are replaced between HEAD and the first ranged GET. One thread ensures that no other shard is open."""

    def replace_shards(number, attempt):
        if number == 0:
            for path in (s3_server.folder / "set" / "shards").iterdir():
                path.write_bytes(bytes(reversed(path.read_bytes())))
        return ""

    monkeypatch.setattr(fetch, "_THREADS", 1)
    s3_server.fault = replace_shards
    with pytest.raises(StorageError, match="was replaced while it was being read"):
        load_samples(s3_server.storage)


def test_permanently_damaged_sample_raises_error_naming_it(s3_server):
    damage_sample(s3_server)
    with pytest.raises(
        DataError, match=r"sample '[\w-]+' in s3://bucket/set/shards/0000\d\.tar at byte \d+ is damaged"
    ):
        load_samples(s3_server.storage)


def damage_sample(s3_server):
    """Damage the sample at position 7 in its shard, and return its key."""
    manifest = Manifest.load(str(s3_server.folder / "set"), Storage())
    index = build_order([manifest], 1, SETTINGS).at(7).index
    path = Path(manifest.shard_url(int(manifest.shard[index])))
    data = bytearray(path.read_bytes())
    data[int(manifest.offset[index]) + 600] ^= 1
    path.write_bytes(data)
    return str(manifest.key[index])


@pytest.mark.parametrize("workers", [0, 1])
def test_substitutes_of_bad_samples_depend_on_the_position(s3_server, reference, workers):
    bad_key = damage_sample(s3_server)
    data = replace(SETTINGS, max_bad_samples=2, workers=workers)
    samples, substitutions = load_samples(s3_server.storage, data=data)
    assert sorted(samples) == sorted(reference)
    bad_positions = [p for p in reference if reference[p][0] == bad_key]
    assert [s.position for s in substitutions] == bad_positions
    for substitution in substitutions:
        assert substitution.key == bad_key
        assert f"sample {bad_key!r} in s3://bucket/set/shards/" in substitution.cause
        assert samples[substitution.position][0] == substitution.substitute != bad_key
        assert substitution.substitute == reference.get(substitution.position + 1, (substitution.substitute,))[0]
    assert {p: v for p, v in samples.items() if p not in bad_positions} == {
        p: v for p, v in reference.items() if p not in bad_positions
    }
    if not workers:
        rank_1, _ = load_samples(s3_server.storage, data=data, rank=1, world=3)
        other_ranks = (
            load_samples(s3_server.storage, data=data, rank=0, world=3)[0]
            | load_samples(s3_server.storage, data=data, rank=2, world=3)[0]
        )
        assert rank_1 | other_ranks == samples


def test_cache_serves_the_second_epoch_and_refetches_damaged_chunks(s3_server, reference, tmp_path):
    data = replace(SETTINGS, cache=CacheConfig(folder=str(tmp_path / "cache"), max_gb=1.0))
    storage = s3_server.storage
    assert load_samples(storage, data=data)[0] == reference
    reads = len(s3_server.ranges)
    assert storage.counters.cache_hits > reads / 2
    for path in (tmp_path / "cache" / "chunks").iterdir():
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    assert load_samples(s3_server.storage, data=data)[0] == reference
    assert set(s3_server.ranges[reads:]) == set(s3_server.ranges[:reads]), "damaged copies are fetched again"


def test_ranks_of_a_machine_share_a_cache(s3_server, reference, tmp_path):
    data = replace(SETTINGS, cache=CacheConfig(folder=str(tmp_path / "cache"), max_gb=1.0))
    samples = {}
    for rank in range(3):
        samples |= load_samples(s3_server.storage, data=data, rank=rank, world=3)[0]
    assert samples == reference
    assert len(set(s3_server.ranges)) == len(s3_server.ranges)


def test_reading_continues_when_the_cache_disk_is_full(s3_server, reference, tmp_path, monkeypatch, caplog):
    def raise_full_disk(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", raise_full_disk)
    data = replace(SETTINGS, cache=CacheConfig(folder=str(tmp_path / "cache"), max_gb=1.0))
    with caplog.at_level(logging.WARNING, "m2f.data_pipeline.loading.chunk_cache"):
        assert load_samples(s3_server.storage, data=data)[0] == reference
    assert len([r for r in caplog.records if r.name == "m2f.data_pipeline.loading.chunk_cache"]) == 1
