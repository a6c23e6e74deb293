"""Tests of the public names of `import m2f`, its speed, and its types as a user's type checker sees them."""

from __future__ import annotations

import ast
import inspect
import re
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
VALID_CODE = """
import numpy as np
import torch
import m2f
from PIL import Image

model: m2f.Model = m2f.load("runs/demo", device="cpu", settings={"evaluation.shortest_edge": 640})
one: m2f.Result = model.predict(np.zeros((4, 5, 3), np.uint8), channels="bgr")
also: m2f.Result = model.predict(Image.new("RGB", (4, 5)), task="semantic", min_score=0.5)
several: list[m2f.Result] = model.predict(["a.jpg", Image.new("RGB", (4, 5))], batch=2)
model.predict("photo.jpg").overlay().save("found.png")
boxes: np.ndarray = one.boxes
names: tuple[str, ...] = one.names
entries = one.to_coco(3)
run: m2f.Run = m2f.train({"name": "x"}, launcher="local")
value: float = run.metrics["val/PQ"]
table: str = m2f.evaluate(run.folder)["val"].table()
m2f.Dataset([np.zeros((4, 5, 3), np.uint8)], [np.zeros((4, 5), np.uint8)], ["road"]).write("shards")
found: list[np.ndarray] = [result.masks for result in model.predict("folder")]
tensor = torch.zeros(4, 5, dtype=torch.int64)
segments = [m2f.PanopticImage(tensor, {1: 0}), m2f.PanopticImage([[0, 1]], {1: 0}, areas={1: 2.0})]
ids: np.ndarray = segments[0].id_map
m2f.Dataset([np.zeros((4, 5, 3), np.uint8)] * 2, [tensor, tensor.tolist()], {0: "road"}).write("shards")
m2f.evaluate_panoptic(segments, segments, class_names={0: "road"}, is_thing={0: False})
m2f.evaluate_semantic([tensor], [tensor.tolist()], class_names={0: "road"})
detected = [m2f.Instances(np.zeros((1, 4, 5), bool), [0], scores=[0.5])]
m2f.evaluate_instances(detected, detected, class_names={0: "road"})
"""
INVALID_CODE = """
import m2f

m2f.lod("runs/demo")
m2f.load("runs/demo", device=3)
m2f.load("runs/demo").predict(3)
"""


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
    heavy = ("torch", "numpy", "ray", "mlflow", "deepspeed", "cv2")
    code = (
        "import time; t = time.process_time(); import m2f; elapsed_s = time.process_time() - t; "
        f"import sys; print(elapsed_s < 0.5, sorted(set({heavy}) & set(sys.modules)), m2f.load.__name__)"
    )
    result = python("-c", code)
    assert result.stdout.split("\n")[0] == "True [] load", result.stderr


def test_version_option_prints_the_package_version():
    result = python("-m", "m2f.cluster.cli", "--version")
    assert (result.returncode, result.stdout) == (0, f"m2f {m2f.__version__}\n")


def test_strict_type_checker_accepts_valid_user_code_and_finds_errors(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pyrefly]\npreset = "strict"\n')
    (tmp_path / "user.py").write_text(VALID_CODE)
    (tmp_path / "wrong.py").write_text(INVALID_CODE)
    checker = [str(Path(sys.executable).with_name("pyrefly")), "check", "--python-interpreter-path", sys.executable]
    home = str(m2f.HOME.parent if (m2f.HOME / "__init__.py").exists() else m2f.HOME)
    words = ["--search-path", home, "--output-format", "min-text", "user.py", "wrong.py"]
    result = subprocess.run([*checker, *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
    assert [re.search(r"(\w+\.py):(\d+)", line).groups() for line in errors] == [
        ("wrong.py", "4"),
        ("wrong.py", "5"),
        ("wrong.py", "6"),
    ], result.stdout + result.stderr
