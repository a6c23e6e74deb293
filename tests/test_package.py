"""What is built from a checkout: sdist, wheel, a wheel by way of the sdist, and none where links are missing."""

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
BESIDE = ("pyproject.toml", "hatch_build.py", "constraints.txt", "README.md", "LICENSE", ".gitignore", ".rayignore")
ROOMS = sorted(path.name for path in (ROOT / "m2f").iterdir() if path.is_symlink())
CACHES = shutil.ignore_patterns("__pycache__")
PACKAGED = Path(__file__).with_name("packaged.py")


def python(folder: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of Python in `folder` that finds packages in `path` before all others."""
    env = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def build(tree: Path, kind: str, target: Path) -> Path:
    """As pip does it, with the build backend that is installed."""
    target.mkdir()
    done = python(tree, "-c", f"import sys, hatchling.build as b; b.build_{kind}(sys.argv[1])", str(target))
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def copy_tree(target: Path) -> Path:
    """The checkout, its links as links."""
    for name in ("m2f", *ROOMS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=CACHES)
    for name in BESIDE:
        shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def files(tree):
    """Every file of the package as it must be in whatever is built."""
    own = {"m2f/__init__.py", "m2f/__init__.pyi", "m2f/py.typed"}
    return own | {
        f"m2f/{path.relative_to(tree)}" for room in ROOMS for path in (tree / room).rglob("*") if path.is_file()
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
    assert {f"m2f/{room}/__init__.py" for room in ROOMS if room != "configs"} <= files


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
    done = python(
        tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)
    )
    assert done.returncode == 0, done.stderr
    for name in ("model.py", "eval/__init__.py", "trainer/__init__.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("raise RuntimeError('a file of the user was imported')\n")
    done = python(work, "-m", "m2f.cluster.cli", "demo", "--help", path=site)
    assert (done.returncode, "usage: m2f demo" in done.stdout) == (0, True), done.stderr
    done = python(work, str(PACKAGED), str(site), str(tmp_path / "sent"), path=site)
    assert (done.returncode, done.stdout) == (0, "demo"), done.stderr


@pytest.fixture
def without_links(tmp_path):
    """A checkout where git has written the targets of links into files."""
    tree = copy_tree(tmp_path / "tree")
    for room in ROOMS:
        (tree / "m2f" / room).unlink()
        (tree / "m2f" / room).write_text(f"../{room}")
    return tree


@pytest.mark.slow
def test_checkout_without_symlinks_works_and_is_packed_completely(without_links, tmp_path, files):
    done = python(tmp_path, str(PACKAGED), str(without_links), str(tmp_path / "sent"), path=without_links)
    assert (done.returncode, done.stdout) == (0, "demo"), done.stderr
    assert files <= contents(tmp_path / "sent" / "m2f.zip").keys()


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_checkout_without_symlinks_cannot_be_packaged(kind, without_links, tmp_path):
    done = python(without_links, "-c", f"import hatchling.build as b; b.build_{kind}({str(tmp_path)!r})")
    assert done.returncode != 0
    assert "m2f/model, " in done.stderr
    assert "core.symlinks true" in done.stderr
