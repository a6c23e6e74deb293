"""Walks through folders, links and loops of links."""

import errno
import os
import re
from pathlib import Path

import pytest

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.folders import list_files, walk_folders


@pytest.fixture
def root(tmp_path):
    """Return a folder with files in subfolders, next to a folder `disk` with one file."""
    for name in (
        "set/b-c/2.png",
        "set/b/1.png",
        "set/b/.hidden/3.png",
        "set/a.png",
        "set/empty/x/4",
        "disk/site/5.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "set/file_link.png").symlink_to(tmp_path / "disk/site/5.png")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere")
    return tmp_path / "set"


def _names(root):
    return [path.relative_to(root).as_posix() for path in list_files(root)]


def test_files_without_links_have_the_order_of_pathlib(root, monkeypatch):
    assert list_files(root) == sorted(path for path in root.rglob("*") if not path.is_dir())
    monkeypatch.chdir(root)
    assert list_files(Path()) == [path.relative_to(root) for path in list_files(root)]


def test_linked_folders_are_listed_under_the_names_of_the_links(root):
    before = _names(root)
    (root / "b/site").symlink_to(root.parent / "disk/site")
    assert set(_names(root)) == {*before, "b/site/5.png"}
    linked = root.parent / "link"
    linked.symlink_to(root)
    assert _names(linked) == _names(root)


def test_loops_and_links_to_folders_in_the_tree_add_no_files(root):
    before = _names(root)
    (root / "a_loop").symlink_to(root)
    (root / "b/back").symlink_to(root / "b")
    (root / "a_copy").symlink_to(root / "b")
    assert _names(root) == before


def test_of_two_links_to_a_folder_the_first_name_counts(root):
    for name in ("z", "y"):
        (root / name).symlink_to(root.parent / "disk")
    (root.parent / "disk/up").symlink_to(root.parent)
    assert [name for name in _names(root) if name.endswith("5.png")] == ["y/site/5.png"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["b", "lost+found"])
def test_only_a_closed_lost_and_found_is_left_out(root, monkeypatch, code, name):
    (root / "b").rename(root / name)
    scan = os.scandir

    def refuse(path):  # root, who runs the tests, may read every folder
        if str(path).endswith(f"/{name}"):
            raise OSError(code, os.strerror(code), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if code == errno.EACCES and name == "lost+found":
        assert f"{name}/1.png" not in _names(root)
    else:
        with pytest.raises(DataError, match=rf"{re.escape(name)} cannot be read: {os.strerror(code)}; correct"):
            list_files(root)
    errors: list[OSError] = []
    assert root / name not in {Path(folder) for folder, _ in walk_folders(str(root), errors.append)}
    assert [error.errno for error in errors] == [code]
