"""Tests of the wheel and the pinned requirements that are stored with a registered model."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from m2f.cluster.project import Project, read_project
from m2f.cluster.registry.wheel import exact_requirements, write_wheel


def test_wheel_contains_the_package_and_is_reproducible(tmp_path):
    project = read_project()
    (tmp_path / "again").mkdir()
    wheel, again = write_wheel(tmp_path, project), write_wheel(tmp_path / "again", project)
    assert wheel.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"m2f-{project.version}.dist-info/METADATA").decode()
    assert {"m2f/__init__.py", "m2f/__init__.pyi", "m2f/py.typed"} <= names
    assert {"m2f/model/mask2former.py", "m2f/configs/demo.yaml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("m2f/tests")]
    assert "Requires-Dist: torch" in metadata
    assert "Provides-Extra: train" in metadata


def test_wheel_can_be_imported_directly(tmp_path):
    wheel = write_wheel(tmp_path, read_project())
    command = [sys.executable, Path(__file__).with_name("import_wheel_main.py"), wheel]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(wheel))


def test_pip_installs_the_wheel(tmp_path):
    wheel = write_wheel(tmp_path, read_project())
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "in", wheel]
    subprocess.run([*command, "--disable-pip-version-check", "-q"], check=True, capture_output=True)
    assert (tmp_path / "in" / "m2f" / "eval" / "functions.py").is_file()
    assert list((tmp_path / "in").glob("m2f-*.dist-info/RECORD"))


def test_requirements_pin_installed_packages_and_their_dependencies():
    found = exact_requirements(read_project())
    names = {Requirement(requirement).name for requirement in found}
    assert {"torch", "numpy", "mlflow", "safetensors", "filelock"} <= names
    assert not {"ray", "deepspeed", "webdataset", "m2f", "pytest"} & names
    assert f"numpy=={version('numpy')}" in found
    assert not [requirement for requirement in found if "+" in requirement]


def test_extras_and_missing_packages_are_omitted():
    project = Project("1", ">=3.11", ("numpy>=1", "ray; extra == 'train'", "no-such-package-exists>=1"))
    names = {Requirement(requirement).name for requirement in exact_requirements(project)}
    assert "numpy" in names
    assert not {"ray", "no-such-package-exists"} & names
