"""Tests of the public names of `import m2f`, its speed, and its types as a user's type checker sees them."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import m2f
from tests.waiting import PATIENCE_S

PUBLIC = [
    "Dataset",
    "Instances",
    "Model",
    "PanopticImage",
    "Result",
    "Run",
    "TrainingFailedError",
    "UserError",
    "evaluate",
    "evaluate_instances",
    "evaluate_panoptic",
    "evaluate_semantic",
    "load",
    "train",
]
VALID = Path(__file__).with_name("typed_user.py")
INVALID = Path(__file__).with_name("mistyped_user.py")


def python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=PATIENCE_S, **options)


def test_public_names_match_the_expected_list():
    assert sorted(m2f.__all__) == PUBLIC
    assert set(dir(m2f)) == {"__version__", *PUBLIC}
    stub = ast.parse(Path(m2f.__file__).with_suffix(".pyi").read_text())
    imported = [name for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(name.asname for name in imported if name.asname) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'lod'; public names: Dataset"):
        _ = m2f.lod


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    value = getattr(m2f, name)
    assert inspect.getdoc(value)
    members = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value) and value.__module__.startswith("m2f.cluster.api"):
        members += [member for key, member in vars(value).items() if not key.startswith("_")]
    for member in members:
        if inspect.isfunction(member) or isinstance(member, property):
            assert inspect.getdoc(member), f"{name}.{member}"


def test_import_is_fast_and_loads_no_heavy_package():
    result = python("-m", "tests.import_time_main", "torch,numpy,ray,mlflow,deepspeed,cv2")
    assert result.stdout.split("\n")[0] == "True [] load", result.stderr


def test_version_option_prints_the_package_version():
    result = python("-m", "m2f.cluster.cli", "--version")
    assert (result.returncode, result.stdout) == (0, f"m2f {m2f.__version__}\n")


def test_strict_type_checker_accepts_valid_user_code_and_finds_errors(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pyrefly]\npreset = "strict"\n')
    for program in (VALID, INVALID):
        shutil.copy(program, tmp_path)
    checker = [str(Path(sys.executable).with_name("pyrefly")), "check", "--python-interpreter-path", sys.executable]
    home = str(m2f.HOME.parent if (m2f.HOME / "__init__.py").exists() else m2f.HOME)
    words = ["--search-path", home, "--output-format", "min-text", VALID.name, INVALID.name]
    result = subprocess.run([*checker, *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
    found = [re.search(r"(\w+\.py):(\d+)", line).groups() for line in errors]
    lines = enumerate(INVALID.read_text().splitlines(), start=1)
    expected = [(INVALID.name, str(number)) for number, line in lines if line.endswith("# error")]
    assert (len(expected), found) == (3, expected), result.stdout + result.stderr
