"""Write m2f as a wheel and list exact versions of its requirements, for storage with a registered model."""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import m2f
from m2f.cluster.project import PACKAGE, Project

FOLDERS = ("model", "data_pipeline", "trainer", "eval", "cluster", "configs")
"""Folders of the package that the wheel contains."""
SERVING_REQUIREMENTS = ("mlflow",)
"""Packages that a served model needs in addition to the dependencies of m2f."""
_TOP_LEVEL_FILES = ("__init__.py", "__init__.pyi", "py.typed")
"""Files at the top level of the package."""
_FILE_DATE = (2000, 1, 1, 0, 0, 0)
"""Date of every file in the wheel. It is fixed, so that equal code results in equal bytes."""


def write_wheel(folder: Path, project: Project) -> Path:
    """Write the running code as a wheel into `folder` and return its path. Equal code results in an equal file."""
    home = m2f.HOME
    wheel = folder / f"{PACKAGE}-{project.version}-py3-none-any.whl"
    info = f"{PACKAGE}-{project.version}.dist-info"
    package_folder = Path(m2f.__file__).parent
    parts = [(f"{PACKAGE}/{name}", (package_folder / name).read_bytes()) for name in _TOP_LEVEL_FILES]
    parts += [(f"{PACKAGE}/{name}", path.read_bytes()) for name, path in _package_files(home)]
    parts += [
        (f"{info}/METADATA", _metadata(project)),
        (f"{info}/WHEEL", _WHEEL),
        (f"{info}/entry_points.txt", _ENTRY_POINTS),
    ]
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in parts] + [f"{info}/RECORD,,"]
    parts.append((f"{info}/RECORD", ("\n".join(record) + "\n").encode()))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts:
            entry = zipfile.ZipInfo(name, _FILE_DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def exact_requirements(project: Project) -> tuple[str, ...]:
    """Return `name==version` for all requirements of a served model, direct and indirect, as installed here.

    They are sorted by name. Packages that are not installed are omitted, because m2f has run without them.
    """
    found: dict[str, str] = {}
    pending = [Requirement(line) for line in (*project.dependencies, *SERVING_REQUIREMENTS)]
    pending = [
        requirement
        for requirement in pending
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    visited: set[tuple[str, str]] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name == PACKAGE or (name, extra) in visited:
                continue
            visited.add((name, extra))
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                continue
            found[name] = version(name).partition("+")[0]  # package indexes lack local builds such as 2.11.0+cpu
            needs = [Requirement(line) for line in installed.requires or ()]
            pending += [
                requirement
                for requirement in needs
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            ]
    return tuple(f"{name}=={found[name]}" for name in sorted(found))


def _package_files(home: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of the package with their paths inside it, in an order that is the same on every machine."""
    for folder in FOLDERS:
        top = home / folder
        for path in sorted(top.rglob("*")):
            inside = path.relative_to(top)
            if path.is_file() and not any(part[0] == "." or part == "__pycache__" for part in inside.parts):
                yield f"{folder}/{inside.as_posix()}", path


def _metadata(project: Project) -> bytes:
    lines = ["Metadata-Version: 2.1", f"Name: {PACKAGE}", f"Version: {project.version}"]
    lines += [f"Requires-Python: {project.python}"]
    extras = {match[1] for line in project.dependencies if (match := re.search(r"extra == ['\"]([\w.-]+)", line))}
    lines += [f"Provides-Extra: {name}" for name in sorted(extras)]
    lines += [f"Requires-Dist: {line}" for line in project.dependencies]
    return ("\n".join(lines) + "\n").encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


_WHEEL = b"Wheel-Version: 1.0\nGenerator: m2f\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_ENTRY_POINTS = b"[console_scripts]\nm2f = m2f.cluster.cli:main\n"
