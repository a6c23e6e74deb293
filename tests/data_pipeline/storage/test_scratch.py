import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage import scratch
from m2f.data_pipeline.storage.scratch import ScratchFolder, report_full_disk, require_free_space, sweep
from tests.mounts import fill_disk, read_only, small_disk

SCRIPT = Path(__file__).with_name("killed_with_scratch.py")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_swept", set())
    return tmp_path


def run_killed_process(temporary):
    assert subprocess.run([sys.executable, SCRIPT, temporary], check=False).returncode == -signal.SIGKILL
    return temporary.glob("m2f-test-*/files/big.bin")


def test_only_folders_of_killed_processes_are_swept(temporary):
    (leftover,) = run_killed_process(temporary)
    (temporary / "m2f-test-of-a-person").mkdir()
    with ScratchFolder("other") as folder:  # the first scratch folder of a process sweeps
        assert not leftover.exists()
        (folder / "file").write_text("kept")
        assert len(list(run_killed_process(temporary))) == 1
        assert sweep(str(temporary)) == 1
        assert sweep(str(temporary)) == 0
        assert (folder / "file").read_text() == "kept"
    assert [path.name for path in temporary.iterdir()] == ["m2f-test-of-a-person"]


def test_scratch_folder_starts_empty_and_is_removed(temporary):
    folder = ScratchFolder("test")
    assert list(folder.path.iterdir()) == []
    folder.remove()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_kept_folder_is_not_swept(temporary):
    folder = ScratchFolder("test")
    (folder.path / "log").touch()
    folder.keep()
    assert sweep(str(temporary)) == 0
    assert (folder.path / "log").exists()


def test_full_temporary_disk_raises_storage_error(temporary):
    with small_disk(temporary / "small", "64k") as disk:
        tempfile.tempdir = str(disk)
        require_free_space(60_000, "a checkpoint")
        with pytest.raises(StorageError, match=r"small: 0\.1 MB are free .* a checkpoint needs 2,000\.0 MB; .* TMPDIR"):
            require_free_space(2_000_000_000, "a checkpoint")
        other = str(disk / "runs" / "new")
        require_free_space(60_000, "a checkpoint", other)
        with pytest.raises(
            StorageError, match=r"small: 0\.1 MB are free .* needs 2,000\.0 MB; choose another `output`$"
        ):
            require_free_space(2_000_000_000, "a checkpoint", other, "choose another `output`")
        folder = ScratchFolder("test")
        with pytest.raises(StorageError, match=r"no space left on the disk for x .* TMPDIR"), report_full_disk("x"):
            (folder.path / "big").write_bytes(b"x" * 100_000)
        folder.remove()
        with read_only(disk), pytest.raises(StorageError, match=r"cannot create a folder there .* set TMPDIR"):
            ScratchFolder("test")


def test_a_folder_that_cannot_be_locked_is_removed(temporary, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="No locks available"):
        ScratchFolder("test")
    assert list(temporary.iterdir()) == []


def test_missing_temporary_directory_raises_storage_error(temporary, monkeypatch):
    with small_disk(temporary / "small", "64k") as disk:
        fill_disk(disk)
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(disk)])  # instead of TMPDIR, /tmp, ...
        with pytest.raises(StorageError, match=r"No usable temporary directory .* set TMPDIR"):
            ScratchFolder("test")
