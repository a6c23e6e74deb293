import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from m2f.trainer.checkpoint.scratch import ScratchFolder, sweep

KILLED = Path(__file__).with_name("killed_with_scratch.py")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_leftovers_of_a_killed_process_are_swept_and_nothing_else(temporary):
    assert subprocess.run([sys.executable, KILLED, temporary], check=False).returncode == -signal.SIGKILL
    with ScratchFolder("m2f-test-") as used, ScratchFolder("m2f-other-") as other:
        (used / "file").write_text("kept")
        (temporary / "m2f-test-of-a-person").mkdir()
        assert len(list(temporary.glob("m2f-test-*/files/big.bin"))) == 1
        assert sweep("m2f-test-") == 1
        assert list(temporary.glob("m2f-test-*/files/big.bin")) == []
        assert (used / "file").read_text() == "kept"
        assert other.is_dir()
        assert sweep("m2f-test-") == 0
    assert [path.name for path in temporary.iterdir()] == ["m2f-test-of-a-person"]


def test_a_folder_holds_only_what_is_put_there(temporary):
    scratch = ScratchFolder("m2f-test-")
    assert list(scratch.path.iterdir()) == []
    scratch.remove()
    scratch.remove()
    assert list(temporary.iterdir()) == []
