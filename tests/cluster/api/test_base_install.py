"""Tests that the base installation can load, predict, score and export without the training packages."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
import venv
from pathlib import Path

import pytest

import m2f
from m2f.model.extras import EXTRA_OF
from tests.test_package import build, copy_tree, python
from tests.waiting import PATIENCE_S

ABSENT = ("ray", "deepspeed", "webdataset", "mlflow", "boto3", "botocore", "psutil", "onnx", "onnxscript")
PROGRAM = """
import json
import subprocess
from pathlib import Path

import numpy as np
import torch

import m2f
from m2f.cluster.cli import main
from m2f.cluster.recipe.load import load_recipe
from m2f.model.mask2former import build_model
from m2f.model.weights.names import to_official_names

Path("recipe.yaml").write_text(RECIPE)
torch.manual_seed(0)
config = load_recipe("recipe.yaml").model
torch.save({"model": to_official_names(build_model(config).state_dict())}, "official.pth")

model = m2f.load("official.pth", recipe="recipe.yaml", device="auto")
image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
results = model.predict([image, image], batch=2)
assert results[0].masks.shape[1:] == (60, 80)
results[0].overlay().save("photo.png")
label_map = model.predict("photo.png", task="semantic").semantic
scores = m2f.evaluate_semantic([label_map], [label_map], class_names=model.names)
assert scores.metrics()["mIoU"] == 100.0

words = ["predict", "recipe.yaml", "photo.png", "--checkpoint", "official.pth", "--output", "out"]
assert main(words) == 0
exported = ["--format", "hugging_face", "--output", "theirs"]
assert main(["export", "recipe.yaml", "--checkpoint", "official.pth", *exported]) == 0
assert m2f.load("theirs").names == model.names
for absent, call in (
    ("mlflow", lambda: m2f.load("models:/name@champion")),
    ("boto3", lambda: m2f.load("s3://bucket/run")),
    ("webdataset", lambda: m2f.Dataset([image], [label_map + 0], model.names).write("shards")),
    ("webdataset", lambda: m2f.train("recipe.yaml")),
):
    try:
        call()
    except m2f.UserError as error:
        assert f"needs {absent}, which is not installed: pip install 'm2f[train]'" in str(error), error
    else:
        raise AssertionError(absent)
print("done")
"""
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


def run(folder, program, **options):
    path = folder / "program.py"
    path.write_text(program)
    return python(folder, str(path), **options)


def without_packages(program):
    """Return the program with a prefix that makes imports of the `ABSENT` packages fail and defines `RECIPE`."""
    return f"import sys\nsys.modules |= dict.fromkeys({ABSENT!r})\nRECIPE = {RECIPE!r}\n{program}"


def test_base_features_work_without_training_packages(tmp_path):
    result = run(tmp_path, without_packages(PROGRAM))
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["done"]), result.stderr


def test_verb_without_its_extra_names_the_extra(tmp_path):
    program = """
    import contextlib
    import io
    from pathlib import Path

    from m2f.cluster.cli import main

    Path("recipe.yaml").write_text(RECIPE)
    for words in VERBS:
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            status = main(words.split())
        print(status, text.getvalue().splitlines()[-1])
    """
    result = run(tmp_path, without_packages(f"VERBS = {list(VERBS)!r}\n{textwrap.dedent(program)}"))
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
    (work / "program.py").write_text(f"RECIPE = {RECIPE!r}\n{PROGRAM}\nprint(m2f.__file__)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(home / "bin" / "python"), "program.py"],
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
