"""Every fault of a data set is reported with its object, sample and byte, and hides no other fault."""

import hashlib
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2f.cluster.cli import main
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.image_file import encode_png
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards import manifest as manifest_module
from m2f.data_pipeline.shards.columns import SAMPLE_SCHEMA
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.shards.verify import verify
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage import stream as object_stream
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.storage.stream import ObjectStream

STORAGE = Storage()
SOURCE = SyntheticSource(num_images=10, seed=4)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return write_dataset(open_reader(SOURCE), DatasetConfig(shards=str(folder), source=SOURCE, shard_mb=0.1), STORAGE)


@pytest.fixture
def damaged(intact, tmp_path):
    """Return a copy of the data set that a test may damage."""
    shutil.copytree(intact.url, tmp_path / "set")
    return tmp_path / "set"


def faults(folder, depth="full"):
    return verify(str(folder), STORAGE, depth, threads=2).faults


def rewrite(folder, change_rows=None, change_document=None):
    """Forge the manifest: change rows or fields, and keep the checksums consistent."""
    table = pq.read_table(folder / "samples.parquet")
    rows = table.to_pylist()
    if change_rows:
        change_rows(rows)
    data = manifest_module.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))
    (folder / "samples.parquet").write_bytes(data)
    document = json.loads((folder / "dataset.json").read_text())
    document["samples"]["sha256"] = hashlib.sha256(data).hexdigest()
    if change_document:
        change_document(document)
    (folder / "dataset.json").write_text(json.dumps(document))


def replace_sample(folder, row, change):
    """Change the bytes of a sample in place, and update all checksums."""
    manifest = Manifest.load(str(folder), STORAGE)
    path = Path(manifest.shard_url(int(manifest.shard[row])))
    data = bytearray(path.read_bytes())
    first, length = int(manifest.offset[row]), int(manifest.length[row])
    sample = bytearray(data[first : first + length])
    change(sample, manifest)
    assert len(sample) == length
    data[first : first + length] = sample
    path.write_bytes(data)

    def rows(entries):
        entries[row]["crc32"] = zlib.crc32(sample)

    def document(content):
        content["shards"][int(manifest.shard[row])]["sha256"] = hashlib.sha256(data).hexdigest()

    rewrite(folder, rows, document)


def replace_member(name, row, new):
    """Return a change for `replace_sample`: new content of a member, padded to the old length."""

    def change(sample, manifest):
        code = manifest.member_names.index(name)
        member = manifest.member_codes[row].tolist().index(code)
        first, length = int(manifest.member_offsets[row][member]), int(manifest.member_lengths[row][member])
        content = new(bytes(sample[first : first + length]))
        assert len(content) <= length
        sample[first : first + length] = content.ljust(length, b" " if name == "json" else b"\0")

    return change


@pytest.mark.parametrize("depth", ["quick", "full"])
def test_intact_data_set_passes_and_reports_progress(intact, depth):
    progress = []
    started = []
    result = verify(intact.url, STORAGE, depth, 2, started.append, lambda n, size: progress.append((n, size)))
    assert result.passed
    assert (result.num_samples, result.num_shards) == (10, len(intact.shards))
    assert sum(n for n, _ in progress) == 10
    assert sum(size for _, size in progress) == (intact.length.sum() if depth == "full" else 0)
    assert [manifest.num_samples for manifest in started] == [10]


def test_quick_check_finds_missing_and_truncated_shards(damaged, intact):
    (damaged / intact.shards[0].name).unlink()
    path = damaged / intact.shards[1].name
    path.write_bytes(path.read_bytes()[:-512])
    missing, truncated = faults(damaged, "quick")
    assert missing.object.endswith("00000.tar")
    assert "does not exist" in missing.problem
    assert truncated.object == str(path)
    assert (
        f"has {intact.shards[1].size - 512} bytes, but its manifest says {intact.shards[1].size}:" in truncated.problem
    )
    assert "write the data set again" in truncated.remedy
    assert len(faults(damaged)) == 2


def test_flipped_bits_are_faults_of_their_samples(damaged, intact):
    for row in (1, 8):
        path = damaged / intact.shards[intact.shard[row]].name
        data = bytearray(path.read_bytes())
        data[int(intact.offset[row]) + 900] ^= 4
        path.write_bytes(data)
    assert not faults(damaged, "quick")
    found = faults(damaged)
    assert [(f.key, f.offset) for f in found] == [(intact.key[row], intact.offset[row]) for row in (1, 8)]
    assert all("checksum" in f.problem for f in found)
    assert f"at byte {intact.offset[1]} (sample '{intact.key[1]}'): its checksum differs" in str(found[0])


def test_damage_outside_samples_is_a_fault(damaged, intact):
    path = damaged / intact.shards[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (fault,) = faults(damaged)
    assert (fault.object, fault.key) == (str(path), None)
    assert "SHA-256" in fault.problem


def test_unreadable_manifest_is_a_fault(damaged):
    (damaged / "samples.parquet").write_bytes(b"x")
    (fault,) = faults(damaged, "quick")
    assert fault.object.endswith("dataset.json")
    assert "does not match its checksum in dataset.json" in fault.problem
    (damaged / "dataset.json").write_text("[" * 100_000)
    assert "not valid JSON" in faults(damaged, "quick")[0].problem
    (damaged / "dataset.json").unlink()
    assert "does not exist" in faults(damaged, "quick")[0].problem


def test_parquet_file_with_other_columns_is_a_fault(damaged):
    other = manifest_module.write_table(pa.table({"key": ["a"]}))
    (damaged / "samples.parquet").write_bytes(other)
    document = json.loads((damaged / "dataset.json").read_text())
    document["samples"]["sha256"] = hashlib.sha256(other).hexdigest()
    (damaged / "dataset.json").write_text(json.dumps(document))
    (fault,) = faults(damaged, "quick")
    assert "have invalid content" in fault.problem


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", "synthetic-4-000003", "appears more than once"),
        ("image_id", 4, "its image id 4 appears more than once"),
        ("shard", 77, "is in shard 77, but there are"),
        ("shard", -1, "is in shard -1"),
        ("offset", 1 << 40, "not inside its shard"),
        ("length", -5, "not inside its shard"),
        ("category_ids", [991], "category ids [991] are not in dataset.json"),
    ],
)
def test_inconsistent_manifests_are_faults(damaged, intact, column, value, message):
    row = next(i for i, key in enumerate(intact.key) if key != "synthetic-4-000003" and i)

    def change(rows):
        rows[row][column] = value
        if column == "category_ids":
            rows[row] |= {"category_counts": [1], "category_areas": [1]}

    rewrite(damaged, change)
    assert any(message in fault.problem for fault in faults(damaged, "quick"))


def test_overlapping_samples_are_faults(damaged, intact):
    row = next(i for i in range(1, 10) if intact.shard[i] == intact.shard[i - 1])

    def change(rows):
        rows[row]["offset"] = rows[row - 1]["offset"] + 512

    rewrite(damaged, change)
    assert any("overlap" in fault.problem for fault in faults(damaged, "quick"))


def test_labels_that_differ_from_the_statistics_are_faults(damaged, intact):
    def change(rows):
        rows[2]["category_areas"] = [area + 1 for area in rows[2]["category_areas"]]
        rows[5]["height"] += 1

    rewrite(damaged, change)
    assert not faults(damaged, "quick")
    found = {fault.key: fault.problem for fault in faults(damaged)}
    assert found.keys() == {intact.key[2], intact.key[5]}
    assert "its category_areas is" in found[intact.key[2]]
    assert "its size is" in found[intact.key[5]]


def bomb(width, height):
    """Return a PNG of a few bytes whose header states this size."""

    def chunk(kind, payload):
        return len(payload).to_bytes(4, "big") + kind + payload + zlib.crc32(kind + payload).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("member", "new", "message"),
    [
        ("seg.png", lambda old: bomb(60_000, 60_000), "seg.png is (60000, 60000), not"),
        ("seg.png", lambda old: encode_png(np.full((2, 2), 9, np.uint8)), "seg.png is (2, 2), not"),
        ("img.jpg", lambda old: bomb(60_000, 60_000), "the image is (60000, 60000), but its description says"),
        ("json", lambda old: b"[" * len(old), "json member of a sample cannot be read"),
        ("json", lambda old: b'{"key": 1}', "json member of a sample cannot be read"),
        ("json", lambda old: old.replace(b'"area":', b'"arxa":', 1), "a segment of its json member cannot be read"),
        ("json", lambda old: old.replace(b'"id":1,', b'"id":9,', 1), "segment ids of `seg` are not unique"),
    ],
)
def test_hostile_members_with_correct_checksums_are_faults(damaged, intact, member, new, message):
    replace_sample(damaged, 3, replace_member(member, 3, new))
    (fault,) = faults(damaged)
    assert fault.key == intact.key[3]
    assert message in fault.problem


def test_areas_that_are_not_numbers_are_faults(damaged, intact):
    replace_sample(
        damaged, 3, replace_member("json", 3, lambda old: re.sub(rb'"area":[0-9.]+', b'"area":NaN', old, count=1))
    )
    (fault,) = faults(damaged)
    assert "area nan or box" in fault.problem


def test_tar_headers_that_other_tools_read_differently_are_faults(damaged, intact):
    def change(sample, manifest):
        other = bytearray(sample[:512])
        other[0:4] = b"/etc"
        sample[:512] = other

    replace_sample(damaged, 3, change)
    (fault,) = faults(damaged)
    assert "has no tar header" in fault.problem


def test_objects_larger_than_a_block_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(object_stream, "_BLOCK", 1000)
    data = np.random.default_rng(0).bytes(10_500)
    (tmp_path / "object").write_bytes(data)
    stream = ObjectStream(str(tmp_path / "object"), STORAGE)
    assert stream.read_at(0, 10) == data[:10]
    stream.discard(4000)
    assert stream.read_at(4000, 2500) == data[4000:6500]
    assert stream.read_at(10_000, 2000) == data[10_000:]
    assert not stream.is_zero_from(10_000)
    assert stream.finish() == hashlib.sha256(data).hexdigest()


def test_verify_command_prints_a_report_and_sets_its_exit_status(capsys, damaged, intact, tmp_path):
    report = tmp_path / "report.json"
    assert main(["verify", intact.url, "--full"]) == 0
    out, err = capsys.readouterr()
    assert "all bytes and samples are valid" in out
    assert "10/10 samples" in err
    (damaged / intact.shards[0].name).unlink()
    assert main(["verify", intact.url, str(damaged), "--quick", "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert "all shards exist and have the right size" in out
    assert "1 fault\n" in out
    assert "00000.tar" in out
    good, bad = json.loads(report.read_text())
    assert good["passed"]
    assert not bad["passed"]
    assert set(bad["faults"][0]) == {"object", "key", "offset", "problem", "remedy"}
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "m2f shard" in capsys.readouterr().out


def test_data_set_in_s3_is_verified(intact, bucket, capsys):
    url = f"{bucket}/a"
    storage = Storage()
    for path in Path(intact.url).rglob("*"):
        if path.is_file():
            storage.put_file(f"{url}/{path.relative_to(intact.url)}", path)
    assert main(["verify", url, "--full"]) == 0
    data = bytearray(Path(intact.shard_url(0)).read_bytes())
    data[int(intact.offset[0]) + 700] ^= 1
    storage.put(f"{url}/{intact.shards[0].name}", bytes(data))
    assert main(["verify", url, "--full"]) == 1
    assert f"{url}/{intact.shards[0].name} at byte 0 (sample" in capsys.readouterr().out
