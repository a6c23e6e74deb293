"""One large image with all tasks and metrics stays within 2 GB, the process with torch and everything else included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import m2f

PROBE = Path(__file__).with_name("memory_probe.py")
LIMIT_MB = 2000


def peak_mb(height: int, width: int, test_time: str) -> int:
    command = [sys.executable, str(PROBE), str(height), str(width), test_time]
    done = subprocess.run(command, cwd=Path(m2f.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.slow
def test_an_image_of_ade20k_with_2048_pixels():
    assert peak_mb(1536, 2048, "whole") < LIMIT_MB


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("height", "width", "test_time"),
    [(1536, 2048, "multi_scale"), (4000, 5000, "whole"), (4000, 5000, "windows")],
)
def test_twenty_megapixels_and_several_sizes(height, width, test_time):
    assert peak_mb(height, width, test_time) < LIMIT_MB
