"""Local files on file systems without hard links, without free space or without write permission."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from m2f.data_pipeline.errors import ObjectExistsError, StorageError
from m2f.data_pipeline.storage.storage import Storage
from tests.mounts import fill_disk, read_only, small_disk


def test_only_one_of_many_writers_creates_a_file_without_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # the error of exFAT

    monkeypatch.setattr(os, "link", refuse)
    storage, url = Storage(), str(tmp_path / "lease")

    def write(number):
        try:
            storage.put(url, f"{number}".encode(), if_absent=True)
        except ObjectExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [number for number in pool.map(write, range(40)) if number is not None]
    assert [storage.get(url)] == [f"{number}".encode() for number in won]
    assert storage.list_unfinished(str(tmp_path)) == ()


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EXDEV])
def test_copies_share_their_bytes_where_hard_links_exist(tmp_path, monkeypatch, error):
    def refuse(*paths):
        raise OSError(error, os.strerror(error))

    if error is not None:
        monkeypatch.setattr(os, "link", refuse)
    source, copy = tmp_path / "source", tmp_path / "folder" / "copy"
    source.write_bytes(b"content")
    Storage().copy(str(source), str(copy))
    assert copy.read_bytes() == b"content"
    assert copy.samefile(source) == (error is None)


def test_copy_to_a_full_disk_raises_error_naming_the_target(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    with small_disk(tmp_path / "small", "64k") as disk:
        fill_disk(disk)
        with pytest.raises(StorageError, match=r"small/copy: No space left on device; free some space"):
            Storage().get_file(str(source), disk / "copy")


def test_an_unreadable_folder_raises_storage_error_and_does_not_count_as_empty(tmp_path, monkeypatch):
    storage, folder = Storage(), tmp_path / "run"
    storage.put(str(folder / "checkpoints/weights"), b"x")

    def refuse(path, *_, **__):  # root, who runs the tests, may read every folder
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        patch.setattr(os, "stat", refuse)
        with pytest.raises(StorageError, match=r"run: Permission denied; check its owner and mode"):
            storage.list(str(folder))
        with pytest.raises(StorageError, match=r"weights: Permission denied; check its owner and mode"):
            storage.exists(str(folder / "checkpoints/weights"))
    assert storage.list(str(tmp_path / "absent")) == ()


def test_linked_folders_are_listed_only_on_request(tmp_path):
    storage = Storage()
    for name in ("set/a", "disk/b", "disk/.partial-c"):
        storage.put(str(tmp_path / name), b"")
    (tmp_path / "set/link").symlink_to(tmp_path / "disk")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    assert storage.list(f"{tmp_path}/set/") == (f"{tmp_path}/set/a",)
    assert storage.list(f"{tmp_path}/set/", follow_links=True) == (f"{tmp_path}/set/a", f"{tmp_path}/set/link/b")
    assert storage.list(f"{tmp_path}/absent", follow_links=True) == ()


def test_read_only_disk_raises_storage_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with (
        read_only(tmp_path / "folder") as folder,
        pytest.raises(StorageError, match=r"Read-only.*; mount it as writable"),
    ):
        Storage().put(str(folder / "new"), b"x")
