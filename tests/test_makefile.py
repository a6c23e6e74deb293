"""Tests that `make test` runs both halves of the suite, and that `make check-lowest` has the lowest versions."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (5, 0, True), (0, 5, True), (2, 5, False)],
)
def test_make_test_runs_both_halves_and_accepts_empty_selections(tmp_path, first, second, passes):
    shutil.copy(Path(__file__).with_name("fake_python.sh"), tmp_path / "python")
    environment = os.environ | {"CALLS": str(tmp_path / "calls"), "FIRST": str(first), "SECOND": str(second)}
    command = ["make", "--old-file", ".venv/installed", "test", f"BIN={tmp_path}"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == passes, result.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_lowest_versions_match_the_project_requirements():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    allowed = " ".join([*project["dependencies"], *extras["export"], *extras["test"]])
    pinned = re.findall(r"(?m)^(\w+)==(.+)\.\*$", (REPOSITORY / "tests" / "lowest.txt").read_text())
    assert len(pinned) >= 8
    assert [(name, version) for name, version in pinned if f"{name}>={version} " not in f"{allowed} "] == []


def test_tests_with_the_lowest_versions_need_no_other_packages():
    tests = [path for path in REPOSITORY.glob("tests/model/**/test_*.py") if path.parts[-2] != "weights"]
    modules = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in tests]
    not_installed = "boto3,deepspeed,hotcoco,matplotlib,mlflow,pyarrow,pycocotools,ray,webdataset"
    command = [sys.executable, "tests/import_without.py", not_installed, *modules]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
