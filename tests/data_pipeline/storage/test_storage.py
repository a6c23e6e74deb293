from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError

from m2f.data_pipeline.config import StorageConfig
from m2f.data_pipeline.errors import (
    MissingObjectError,
    ObjectExistsError,
    StorageError,
)
from m2f.data_pipeline.storage import s3 as s3_store
from m2f.data_pipeline.storage.storage import Storage, join

BODY = bytes(range(256)) * 4


@pytest.fixture(params=["local", "s3"])
def storage_and_root(request, tmp_path):
    """Return a storage and the URL of an empty folder in it."""
    if request.param == "local":
        return Storage(), str(tmp_path / "root")
    endpoint = request.getfixturevalue("s3_endpoint")
    return Storage(StorageConfig(endpoint_url=endpoint)), f"s3://box/{tmp_path.name}"


def test_written_bytes_are_read_back(storage_and_root, tmp_path):
    storage, root = storage_and_root
    url = join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.put(url, BODY)
    assert storage.exists(url)
    assert storage.size(url) == len(BODY)
    assert storage.get(url) == BODY
    assert storage.get_range(url, 3, 500) == BODY[3:503]
    assert storage.get_range(url, 7, 0) == b""
    storage.put(url, b"new")
    assert storage.get(url) == b"new"
    assert storage.counters.bytes_written == len(BODY) + 3
    assert storage.counters.retries == 0


def test_written_files_are_read_back(storage_and_root, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "_FILE_PART_BYTES", 300)
    storage, root = storage_and_root
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(BODY)
    storage.put_file(join(root, "file"), source)
    storage.get_file(join(root, "file"), target)
    assert target.read_bytes() == BODY
    with pytest.raises(MissingObjectError):
        storage.get_file(join(root, "other"), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_copy_stays_when_the_original_is_replaced_or_deleted(storage_and_root):
    storage, root = storage_and_root
    source, copies = join(root, "a", "source"), [join(root, name, "copy") for name in ("b", "c")]
    storage.put(source, BODY)
    written = storage.counters.bytes_written
    storage.copy(source, copies[0])
    assert storage.counters.bytes_written == written
    storage.put(source, b"new")
    storage.copy(source, copies[1])
    storage.copy(source, copies[1])  # a repeated copy replaces the first one
    storage.delete(source)
    assert [storage.get(copy) for copy in copies] == [BODY, b"new"]
    with pytest.raises(MissingObjectError, match=r"a/source.* does not exist"):
        storage.copy(source, copies[0])


def test_a_store_that_cannot_copy_gets_the_bytes_again(s3_endpoint, caplog):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint))
    storage.put("s3://box/cannot/source", BODY)
    client = storage._s3._get_client()

    def refuse(*arguments, **options):
        raise ClientError({"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}, "Copy")

    client.copy = refuse
    storage.copy("s3://box/cannot/source", "s3://box/cannot/copy")
    assert storage.get("s3://box/cannot/copy") == BODY
    assert "s3://box/cannot/source is copied through this machine: " in caplog.text


def test_if_absent_never_overwrites(storage_and_root):
    storage, root = storage_and_root
    url = join(root, "once")
    storage.put(url, b"first", if_absent=True)
    with pytest.raises(ObjectExistsError, match="once already exists"):
        storage.put(url, b"second", if_absent=True)
    assert storage.get(url) == b"first"


def test_only_one_of_many_conditional_writers_wins(storage_and_root):
    storage, root = storage_and_root

    def write(i):
        try:
            storage.put(join(root, "race"), b"%d" % i, if_absent=True)
        except ObjectExistsError:
            return None
        return i

    with ThreadPoolExecutor(8) as pool:
        winners = [i for i in pool.map(write, range(8)) if i is not None]
    assert len(winners) == 1
    assert storage.get(join(root, "race")) == b"%d" % winners[0]


def test_prefixes_end_at_slashes_and_deleting_twice_is_allowed(storage_and_root):
    storage, root = storage_and_root
    urls = [join(root, name) for name in ("x/1", "x/2", "x/y/3", "xx/4")]
    assert storage.list(root) == ()
    for url in urls:
        storage.put(url, b"")
    assert storage.list(root) == tuple(sorted(urls))
    assert storage.list(join(root, "x")) == tuple(urls[:3])
    assert storage.list(join(root, "x/")) == tuple(urls[:3])
    storage.delete(urls[0])
    storage.delete(urls[0])
    storage.delete_prefix(join(root, "x"))
    storage.delete_prefix(join(root, "x"))
    assert storage.list(root) == (urls[3],)


def test_missing_and_short_objects_raise_errors_with_their_url(storage_and_root):
    storage, root = storage_and_root
    url = join(root, "short")
    for call in (storage.get, storage.size, lambda u: storage.get_range(u, 0, 1)):
        with pytest.raises(MissingObjectError, match="short"):
            call(url)
    storage.put(url, b"0123456789")
    for offset in (5, 20):
        with pytest.raises(StorageError, match="short"):
            storage.get_range(url, offset, 10)
    assert storage.counters.retries == 0


def test_a_replaced_object_is_not_mixed_with_the_old_one(storage_and_root):
    storage, root = storage_and_root
    url = join(root, "shard")
    storage.put(url, BODY)
    info = storage.stat(url)
    assert info.size == len(BODY)
    assert storage.get_range(url, 5, 10, info.etag) == BODY[5:15]
    storage.put(url, BODY[::-1])
    if info.etag is None:  # local files have no ETag
        return
    with pytest.raises(StorageError, match="shard was replaced while it was being read"):
        storage.get_range(url, 5, 10, info.etag)
    assert storage.counters.retries == 0


def test_pickled_storage_works_without_its_client(storage_and_root):
    storage, root = storage_and_root
    storage.put(join(root, "k"), b"v")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.get(join(root, "k")) == b"v"
    assert copy.config == storage.config


def test_invalid_urls_are_refused(tmp_path):
    storage = Storage()
    for url, message in (
        ("gs://bucket/key", "scheme 'gs' is not supported"),
        ("s3://bucket", "the object key is missing"),
        ("s3:///key", "the bucket is missing"),
    ):
        with pytest.raises(StorageError, match=message):
            storage.get(url)
    with pytest.raises(StorageError, match="whole bucket"):
        storage.delete_prefix("s3://bucket/")
    with pytest.raises(StorageError, match="root of the file system"):
        storage.delete_prefix("/")
    with pytest.raises(StorageError, match="is a folder"):
        storage.get(str(tmp_path))


def test_missing_bucket_raises_error_with_its_name(s3_endpoint):
    storage = Storage(StorageConfig(endpoint_url=s3_endpoint))
    with pytest.raises(MissingObjectError, match="bucket 'nowhere' does not exist"):
        storage.get("s3://nowhere/key")
    with pytest.raises(MissingObjectError, match="bucket 'nowhere'"):
        storage.list("s3://nowhere/folder")


def test_failed_or_killed_local_writes_leave_no_visible_file(tmp_path, monkeypatch):
    storage = Storage()
    target = tmp_path / "folder" / "file"
    storage.put(str(target), b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        storage.put(str(target), b"new")
    assert target.read_bytes() == b"old"
    (target.parent / ".partial-killed").write_bytes(b"half")
    assert storage.list(str(tmp_path)) == (str(target),)


def test_join_separates_parts_by_single_slashes():
    assert join("s3://b/x/", "/y", "z") == "s3://b/x/y/z"
    assert join("/tmp", "a") == "/tmp/a"
    assert join("runs", "a", "b") == "runs/a/b"
