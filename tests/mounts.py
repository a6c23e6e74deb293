"""Mount real file systems that are full or read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of the given size (such as `2m`) at `folder`. Skip the test if mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Mount the folder read-only, because root ignores file modes. Skip the test if mounting is not allowed."""
    with ExitStack() as stack:
        stack.enter_context(_mounted(folder, "--bind", str(folder)))
        _mount(folder, "-o", "remount,ro,bind")
        yield folder


def fill_disk(folder: Path, num_free_bytes: int = 0) -> Path:
    """Fill the disk of a folder except for `num_free_bytes`, and return the file to delete."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
        file.truncate(file.tell() - num_free_bytes)
    return filler


@contextmanager
def _mounted(folder: Path, *words: str) -> Iterator[None]:
    _mount(folder, *words)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, *words: str) -> None:
    result = subprocess.run(["mount", *words, str(folder)], check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"a file system for this test cannot be mounted here: {result.stderr.strip()}")
