"""A process that evaluates one large image needs less than 2 GB, including torch and all other libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import m2f

PROBE = Path(__file__).with_name("memory_probe.py")
LIMIT_MB = 2000
ALL = "panoptic,instance,semantic"


def peak_mb(height: int, width: int, test_time: str, tasks: str, queries: int = 100) -> int:
    command = [sys.executable, str(PROBE), str(height), str(width), test_time, tasks, str(queries)]
    done = subprocess.run(command, cwd=Path(m2f.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.slow
def test_ade20k_image_of_2048_pixels_stays_within_the_memory_limit():
    assert peak_mb(1536, 2048, "whole", ALL) < LIMIT_MB


@pytest.mark.slow
def test_full_size_masks_of_many_queries_are_not_held_at_once():
    # 400 masks of 2943 x 1435 pixels would take 1.7 GB, in addition to 0.9 GB of libraries.
    assert peak_mb(1435, 2943, "whole", "instance", 400) < LIMIT_MB


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("height", "width", "test_time", "tasks"),
    [
        (1536, 2048, "multi_scale", "semantic"),
        (4000, 5000, "whole", ALL),
        (4000, 5000, "windows", "semantic"),
        (4000, 5000, "windows", "panoptic"),
        (4000, 5000, "windows", "instance"),
    ],
)
def test_20_megapixels_and_multi_scale_stay_within_the_memory_limit(height, width, test_time, tasks):
    assert peak_mb(height, width, test_time, tasks) < LIMIT_MB
