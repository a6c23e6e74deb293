"""Real file systems that are full or cannot be written to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size (`2m`) at `folder`. The test is skipped where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder, which nobody can write to; as root, modes do not count. The test may be skipped as above."""
    with ExitStack() as stack:
        stack.enter_context(_mounted(folder, "--bind", str(folder)))
        _mount(folder, "-o", "remount,ro,bind")
        yield folder


def fill(folder: Path, leave: int = 0) -> Path:
    """Use up the disk of a folder but for some bytes; returns the file to delete."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
        file.truncate(file.tell() - leave)
    return filler


@contextmanager
def _mounted(folder: Path, *words: str) -> Iterator[None]:
    _mount(folder, *words)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, *words: str) -> None:
    done = subprocess.run(["mount", *words, str(folder)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system for this test cannot be mounted here: {done.stderr.strip()}")
