"""Fixtures shared by all tests: where the optional real data and golden numbers are, and a quiet environment."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Set before torch, deepspeed or ray are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Machines are noisy: an example that takes long once is no defect.
hypothesis.settings.register_profile("m2f", deadline=None)
hypothesis.settings.load_profile("m2f")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("M2F_SHARED", REPOSITORY.parent / "shared"))


def _present(folder: Path) -> Path:
    if not folder.exists():
        pytest.skip(f"{folder.name} is not here (looked in {folder}); set M2F_SHARED to its parent folder")
    return folder


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with numbers made by the official code."""
    return _present(SHARED / "goldens" / "official")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images and annotations."""
    return _present(SHARED / "data")
