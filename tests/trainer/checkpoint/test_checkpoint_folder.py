import json

import pytest

from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.trainer.checkpoint.folder import (
    MANIFEST,
    CheckpointManifest,
    Receipt,
    checkpoint_url,
    delete_old,
    fetch,
    file_entry,
    folders_to_delete,
    list_checkpoints,
    newest_undamaged,
    pin,
    read_manifest,
    read_receipt,
    set_aside,
    unpin,
    verify_sizes,
    write_receipt,
)
from m2f.trainer.errors import CheckpointError, NewerFormatError


@pytest.fixture
def storage():
    return Storage()


@pytest.fixture
def run_folder(tmp_path):
    return str(tmp_path / "run")


def make_checkpoint(storage, run_folder, step, tmp_path, committed=True):
    """Write a checkpoint of two small files and return its URL."""
    url, files = checkpoint_url(run_folder, step), {}
    for name, content in (("state.json", b"{}"), ("engine/a.pt", b"tensors")):
        local = tmp_path / "local"
        local.write_bytes(content)
        storage.put_file(join(url, name), local)
        files[name] = file_entry(local)
    if committed:
        storage.put(join(url, MANIFEST), CheckpointManifest(step, 1, 1, files).to_json())
    return url


def test_only_committed_checkpoints_are_listed_newest_first(storage, run_folder, tmp_path):
    for step in (5, 100_000_000, 10):
        make_checkpoint(storage, run_folder, step, tmp_path)
    make_checkpoint(storage, run_folder, 20, tmp_path, committed=False)
    listed = list_checkpoints(storage, run_folder)
    assert [c.step for c in listed] == [100_000_000, 10, 5]
    assert listed[1].url == checkpoint_url(run_folder, 10)
    assert listed[1].url.endswith("run/checkpoints/step_00000010")


def test_run_without_checkpoints_lists_none(storage, run_folder):
    assert list_checkpoints(storage, run_folder) == ()


def test_a_whole_checkpoint_verifies_and_is_fetched(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    manifest = verify_sizes(storage, url)
    fetch(storage, url, list(manifest.files), manifest, tmp_path / "fetched")
    assert (tmp_path / "fetched/engine/a.pt").read_bytes() == b"tensors"


def test_a_missing_file_is_named(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    storage.delete(join(url, "engine/a.pt"))
    with pytest.raises(CheckpointError, match=r"incomplete.*engine/a\.pt"):
        verify_sizes(storage, url)


def test_truncated_file_is_named(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    storage.put(join(url, "engine/a.pt"), b"tensor")
    with pytest.raises(CheckpointError, match=r"engine/a\.pt has 6 bytes instead of 7"):
        verify_sizes(storage, url)


def test_a_changed_byte_is_found_before_the_file_is_used(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    storage.put(join(url, "engine/a.pt"), b"tensorS")
    manifest = verify_sizes(storage, url)
    with pytest.raises(CheckpointError, match=r"checksum of engine/a\.pt"):
        fetch(storage, url, ["engine/a.pt"], manifest, tmp_path / "fetched")


def test_file_missing_from_the_manifest_is_not_fetched(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    with pytest.raises(CheckpointError, match="has no rng"):
        fetch(storage, url, ["rng/rank_00001.pt"], read_manifest(storage, url), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 1, "step": 1, "files": {"a": 1}}', b"\xff"]
)
def test_invalid_manifest_is_refused_and_named(storage, run_folder, content):
    url = checkpoint_url(run_folder, 5)
    storage.put(join(url, MANIFEST), content)
    with pytest.raises(CheckpointError, match=r"step_00000005/manifest\.json"):
        read_manifest(storage, url)


def test_newer_checkpoint_format_is_not_damage_and_stops_the_run(storage, run_folder, tmp_path):
    make_checkpoint(storage, run_folder, 3, tmp_path)
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    newer = json.loads(storage.get(join(url, MANIFEST))) | {"version": 3}
    storage.put(join(url, MANIFEST), json.dumps(newer).encode())
    for look in (lambda: read_manifest(storage, url), lambda: newest_undamaged(storage, run_folder)):
        with pytest.raises(NewerFormatError, match=r"step_00000005/manifest\.json has format 3, but .* up to 2"):
            look()


@pytest.mark.parametrize("content", ["", '{"attempt": "a", "fi', "[]", '{"attempt": "a", "files": {"x": 1}}'])
def test_damaged_receipt_raises_checkpoint_error(storage, run_folder, content):
    url = checkpoint_url(run_folder, 5)
    storage.put(join(url, "receipts/rank_00000.json"), content.encode())
    with pytest.raises(CheckpointError, match=r"rank_00000\.json cannot be read .*; restart the run"):
        read_receipt(storage, url, 0)


def test_receipt_round_trips_through_storage(storage, run_folder, tmp_path):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)
    assert read_receipt(storage, url, 1) is None
    receipt = Receipt("attempt", read_manifest(storage, url).files)
    write_receipt(storage, url, 1, receipt)
    assert read_receipt(storage, url, 1) == receipt


def test_old_checkpoints_are_deleted_unless_pinned(storage, run_folder, tmp_path):
    urls = {
        step: make_checkpoint(storage, run_folder, step, tmp_path, committed=step != 15) for step in range(5, 35, 5)
    }
    pin(storage, urls[5], "evaluation")
    delete_old(storage, run_folder, newest=30, keep=2)
    assert [c.step for c in list_checkpoints(storage, run_folder)] == [30, 25, 5]
    assert storage.list(urls[15]) == ()  # the leftover of an interrupted save
    unpin(storage, urls[5], "evaluation")
    delete_old(storage, run_folder, newest=30, keep=2)
    assert [c.step for c in list_checkpoints(storage, run_folder)] == [30, 25]


@pytest.mark.parametrize(
    ("committed", "others", "newest", "keep", "expected"),
    [
        ([1, 2, 3], [], 3, 3, ()),
        ([1, 2, 3, 4], [], 4, 3, (1,)),
        ([4], [1, 2], 4, 2, ()),  # fewer than `keep`: nothing is deleted
        ([3, 4], [1], 4, 2, (1,)),
        ([1, 2, 3, 9], [], 3, 2, (1,)),  # 9 was damaged and the run resumed from 2
    ],
)
def test_retention_keeps_the_newest_checkpoints(committed, others, newest, keep, expected):
    urls = [f"s3://bucket/run/checkpoints/step_{step:08d}/manifest.json" for step in committed]
    urls += [f"s3://bucket/run/checkpoints/step_{step:08d}/engine/x.pt" for step in (*committed, *others)]
    assert folders_to_delete(urls, newest, keep) == tuple(f"step_{step:08d}" for step in expected)


def test_newest_whole_checkpoint_has_no_truncated_file(storage, run_folder, tmp_path):
    assert newest_undamaged(storage, run_folder) is None
    for step in (5, 10, 15):
        make_checkpoint(storage, run_folder, step, tmp_path)
    storage.put(join(checkpoint_url(run_folder, 15), "engine/a.pt"), b"tensor")
    storage.delete(join(checkpoint_url(run_folder, 10), "state.json"))
    assert newest_undamaged(storage, run_folder).step == 5


def test_checkpoint_set_aside_is_not_listed_but_keeps_its_files(storage, run_folder, tmp_path):
    for step in (5, 10):
        make_checkpoint(storage, run_folder, step, tmp_path)
    url = checkpoint_url(run_folder, 10)
    manifest = storage.get(join(url, MANIFEST))
    set_aside(storage, url)
    assert [c.step for c in list_checkpoints(storage, run_folder)] == [5]
    assert storage.get(join(url, "damaged.json")) == manifest
    assert storage.exists(join(url, "engine/a.pt"))


def test_storage_outage_is_not_treated_as_damage(storage, run_folder, tmp_path, monkeypatch):
    url = make_checkpoint(storage, run_folder, 5, tmp_path)

    def refuse(address):
        raise StorageError(f"{address}: 503")

    monkeypatch.setattr(storage, "size", refuse)
    with pytest.raises(StorageError, match="503"):
        verify_sizes(storage, url)
