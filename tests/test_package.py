"""Tests of packages built from a checkout: sdist, wheel, wheel from the sdist, and checkouts without symlinks."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
TOP_FILES = ("pyproject.toml", "hatch_build.py", "constraints.txt", "README.md", "LICENSE", ".gitignore", ".rayignore")
FOLDERS = sorted(path.name for path in (ROOT / "m2f").iterdir() if path.is_symlink())
CACHES = shutil.ignore_patterns("__pycache__")
CHECK_SCRIPT = Path(__file__).with_name("packaged.py")


def python(folder: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`. Packages in `path` take precedence over all others."""
    env = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def build(tree: Path, kind: str, target: Path) -> Path:
    """Build a package as pip does, with the installed build backend, and return its path."""
    target.mkdir()
    result = python(tree, "-c", f"import sys, hatchling.build as b; b.build_{kind}(sys.argv[1])", str(target))
    assert result.returncode == 0, result.stderr
    (built,) = target.iterdir()
    return built


def copy_tree(target: Path) -> Path:
    """Copy the checkout, with symlinks kept as symlinks."""
    for name in ("m2f", *FOLDERS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=CACHES)
    for name in TOP_FILES:
        shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def files(tree):
    """Return the names of all files that a package must contain."""
    top_level = {"m2f/__init__.py", "m2f/__init__.pyi", "m2f/py.typed"}
    return top_level | {
        f"m2f/{path.relative_to(tree)}" for folder in FOLDERS for path in (tree / folder).rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build(tree, "sdist", tmp_path_factory.mktemp("built") / "sdist")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "wheel", tmp_path_factory.mktemp("built") / "wheel")


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def test_wheel_contains_all_packages_and_recipes(wheel, files):
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == files
    assert {"m2f/configs/demo.yaml", "m2f/cluster/cloud/kuberay.yaml", "m2f/cluster/cloud/Dockerfile"} <= files
    assert {f"m2f/{folder}/__init__.py" for folder in FOLDERS if folder != "configs"} <= files


def test_sdist_contains_the_same_files_and_builds_the_same_wheel(sdist, wheel, files, tmp_path):
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
        packed.extractall(tmp_path, filter="data")
    assert {name for name in names if name.startswith("m2f/")} == files
    assert {"constraints.txt", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml"} <= names
    (unpacked,) = tmp_path.iterdir()
    assert contents(build(unpacked, "wheel", tmp_path / "wheel")) == contents(wheel)


@pytest.mark.slow
def test_installed_demo_ignores_user_files_named_like_its_packages(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    result = python(
        tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)
    )
    assert result.returncode == 0, result.stderr
    for name in ("model.py", "eval/__init__.py", "trainer/__init__.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("raise RuntimeError('a file of the user was imported')\n")
    result = python(work, "-m", "m2f.cluster.cli", "demo", "--help", path=site)
    assert (result.returncode, "usage: m2f demo" in result.stdout) == (0, True), result.stderr
    result = python(work, str(CHECK_SCRIPT), str(site), str(tmp_path / "archives"), path=site)
    assert (result.returncode, result.stdout) == (0, "demo"), result.stderr


@pytest.fixture
def without_links(tmp_path):
    """Return a checkout on a system without symlinks: git writes each link as a text file with its target."""
    tree = copy_tree(tmp_path / "tree")
    for folder in FOLDERS:
        (tree / "m2f" / folder).unlink()
        (tree / "m2f" / folder).write_text(f"../{folder}")
    return tree


@pytest.mark.slow
def test_checkout_without_symlinks_works_and_is_packed_completely(without_links, tmp_path, files):
    result = python(tmp_path, str(CHECK_SCRIPT), str(without_links), str(tmp_path / "archives"), path=without_links)
    assert (result.returncode, result.stdout) == (0, "demo"), result.stderr
    assert files <= contents(tmp_path / "archives" / "m2f.zip").keys()


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_checkout_without_symlinks_cannot_be_packaged(kind, without_links, tmp_path):
    result = python(without_links, "-c", f"import hatchling.build as b; b.build_{kind}({str(tmp_path)!r})")
    assert result.returncode != 0
    assert "m2f/model, " in result.stderr
    assert "core.symlinks true" in result.stderr
