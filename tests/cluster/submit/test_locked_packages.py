"""Tests that the image pins all packages that m2f requires by hash, in the versions of constraints.txt."""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOME = Path(__file__).parents[3]
CLOUD = HOME / "cluster" / "cloud"
LOCKED, BUILDERS = CLOUD / "requirements.txt", CLOUD / "build.txt"
REMEDY = "write cluster/cloud/build.txt and requirements.txt again, see docs/cloud.md"
IMAGE = {
    "python_version": "3.11",
    "python_full_version": "3.11.13",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def pins(path: Path) -> dict[str, str]:
    """Return the pinned version of each package of a requirements file."""
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("path", [LOCKED, BUILDERS], ids=lambda path: path.name)
def test_every_line_pins_a_version_by_hash(path):
    text = path.read_text()
    entries = re.sub(r" \\\n\s+", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert len(entries) == len(pins(path))
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==\S+( --hash=sha256:[0-9a-f]{64})+", entry), entry[:80]
    assert "://" not in text, "the file works with every index"


def test_locked_versions_match_the_constraints():
    known = pins(HOME / "constraints.txt")
    locked = pins(BUILDERS) | pins(LOCKED)
    assert {name: version for name, version in locked.items() if known.get(name, version) != version} == {}, REMEDY
    assert locked.keys() - known.keys() <= {"setuptools", "tomlkit", "wheel"}, REMEDY
    assert pins(LOCKED)["setuptools"] == pins(BUILDERS)["setuptools"]


def test_all_requirements_of_m2f_are_locked():
    """Otherwise, the image build fails, because pip refuses packages without a hash."""
    locked, visited = pins(LOCKED), set[tuple[str, str]]()

    def visit(name: str, extra: str) -> None:
        if (name, extra) in visited:
            return
        visited.add((name, extra))
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # a package for another platform or build of torch
            return
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate(IMAGE | {"extra": extra}):
                for each in ("", *requirement.extras):
                    visit(canonicalize_name(requirement.name), each)

    visit("m2f", "")
    visit("m2f", "train")
    assert {name for name, _ in visited} - {"m2f"} <= locked.keys(), REMEDY


def test_image_installs_by_hash_for_its_python_version():
    image = (CLOUD / "Dockerfile").read_text()
    version = re.search(r"^FROM \S+-py3(\d+)-gpu$", image, re.MULTILINE)[1]
    for path in (LOCKED, BUILDERS):
        assert f"--python-version 3.{version} " in path.read_text(), REMEDY
        assert f"--require-hashes --requirement cluster/cloud/{path.name}" in re.sub(
            r" --no-build-isolation", "", image
        )
    assert "pip install --no-cache-dir --no-deps --no-build-isolation ." in image
