"""Tests that the base installation can load, predict, score and export without the training packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import m2f
from m2f.model.extras import EXTRA_OF
from tests.test_package import build, copy_tree, python
from tests.waiting import PATIENCE_S

ABSENT = ("ray", "deepspeed", "webdataset", "mlflow", "boto3", "botocore", "psutil", "onnx", "onnxscript")
PROGRAM = str(Path(__file__).with_name("base_install_main.py"))
RECIPE = """
name: small
output: runs
datasets: {train: {shards: absent}}
data: {train: [{dataset: train}]}
model:
  backbone: {name: resnet50, options: {layers: [1, 1, 1, 1], channels: [8, 16, 24, 32]}}
  pixel_decoder: {conv_dim: 32, mask_dim: 16, num_layers: 1, num_heads: 2, feedforward_dim: 1024}
  transformer_decoder: {num_queries: 5, num_layers: 2, hidden_dim: 32, num_heads: 2, feedforward_dim: 48}
  num_classes: 3
training: {max_steps: 10}
evaluation: {shortest_edge: 64, max_size: 96}
"""
VERBS = {
    "train recipe.yaml": "ray",
    "demo --output out": "ray",
    "submit recipe.yaml --address http://127.0.0.1:1": "ray",
    "compare a b": "mlflow",
}


def test_base_features_work_without_training_packages(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = python(tmp_path, PROGRAM, ",".join(ABSENT))
    assert (result.returncode, result.stdout.splitlines()[-2:-1]) == (0, ["done"]), result.stderr


def test_verb_without_its_extra_names_the_extra(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    program = str(Path(__file__).with_name("missing_extra_main.py"))
    result = python(tmp_path, program, ",".join(ABSENT), *VERBS)
    expected = [
        f"2 m2f {words.split()[0]} needs {absent}, which is not installed: pip install 'm2f[train]'"
        for words, absent in VERBS.items()
    ]
    assert result.stdout.splitlines() == expected, result.stderr


def test_extras_contain_the_packages_missing_in_base():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    extras, base = project["optional-dependencies"], " ".join(project["dependencies"])
    for package, extra in EXTRA_OF.items():
        assert package not in base
        assert package == "botocore" or any(text.startswith(package) for text in extras[extra])
    assert extras["all"] == ["m2f[export,serve,train]"]
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert "--editable '.[all,test,dev]'" in makefile


@pytest.mark.slow
def test_wheel_works_in_an_environment_with_base_packages_only(tmp_path):
    """The environment has symlinks to the installed packages except `outside`; m2f is installed from its wheel."""
    wheel = build(copy_tree(tmp_path / "tree"), "wheel", tmp_path / "built")
    home = tmp_path / "environment"
    venv.create(home, symlinks=True, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    site_packages = next(Path(folder) for folder in sys.path if folder.endswith("site-packages"))
    outside = {*ABSENT, "onnxruntime", "onnx_ir", "pip", "m2f", "transformers", "moto", "pytest", "_pytest"}
    for entry in site_packages.iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if (
            name not in outside
            and not entry.name.startswith(("__editable__", "_m2f", "m2f-"))
            and entry.suffix != ".pth"
        ):
            (site / entry.name).symlink_to(entry)
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    result = python(tmp_path, *words)
    assert result.returncode == 0, result.stderr
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(RECIPE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(home / "bin" / "python"), PROGRAM, ""],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    expected = ["done", str(site / "m2f/__init__.py")]
    assert (result.returncode, result.stdout.splitlines()[-2:]) == (0, expected), result.stderr
    result = subprocess.run(
        [str(home / "bin" / "python"), "-m", "m2f.cluster.cli", "--version"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.stdout == f"m2f {m2f.__version__}\n", result.stderr
