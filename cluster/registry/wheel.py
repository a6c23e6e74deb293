"""This program as a wheel, and the exact versions of what it needs to predict: both travel with a registered model."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

import m2f

PACKAGE = "m2f"
FOLDERS = ("model", "data_pipeline", "trainer", "eval", "cluster", "configs")
SERVING = ("mlflow",)
"""What a served model needs beside the program's own base."""
_TOP = ("__init__.py", "__init__.pyi", "py.typed")
"""Files of the package beside its folders."""
_DATE = (2000, 1, 1, 0, 0, 0)
"""Of every file in the wheel: equal code gives equal bytes."""


@dataclass(frozen=True)
class Project:
    """What an installer must know of this program."""

    version: str
    python: str
    """Versions of Python, as `>=3.11`."""
    dependencies: tuple[str, ...]
    """Requirements; those of an extra carry its marker."""


def this_project() -> Project:
    """From pyproject.toml in a checkout, whose installed metadata may be old; else from the installed metadata."""
    file = Path(m2f.__file__).resolve().parents[1] / "pyproject.toml"
    if not file.is_file():
        found = distribution(PACKAGE)
        return Project(found.version, found.metadata["Requires-Python"], tuple(found.requires or ()))
    table = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {})
    return Project(
        m2f.__version__,
        table["requires-python"],
        (*table["dependencies"], *(_of_extra(one, name) for name, needs in extras.items() for one in needs)),
    )


def write_wheel(folder: Path, project: Project) -> Path:
    """Write the code that runs here as a wheel into `folder`; equal code gives an equal file."""
    home = m2f.HOME
    wheel = folder / f"{PACKAGE}-{project.version}-py3-none-any.whl"
    info = f"{PACKAGE}-{project.version}.dist-info"
    own = Path(m2f.__file__).parent
    parts = [(f"{PACKAGE}/{name}", (own / name).read_bytes()) for name in _TOP]
    parts += [(f"{PACKAGE}/{name}", path.read_bytes()) for name, path in _code(home)]
    parts += [
        (f"{info}/METADATA", _metadata(project)),
        (f"{info}/WHEEL", _WHEEL),
        (f"{info}/entry_points.txt", _SCRIPT),
    ]
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in parts] + [f"{info}/RECORD,,"]
    parts.append((f"{info}/RECORD", ("\n".join(record) + "\n").encode()))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts:
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def exact_requirements(project: Project) -> tuple[str, ...]:
    """`name==version` of everything that a served model imports, as it is installed here, by name.

    Packages that are not installed are left out: nothing has needed them.
    """
    found: dict[str, str] = {}
    waiting = [Requirement(one) for one in (*project.dependencies, *SERVING)]
    waiting = [one for one in waiting if one.marker is None or one.marker.evaluate({"extra": ""})]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = _normal(wanted.name)
        for extra in ("", *wanted.extras):
            if name == PACKAGE or (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                known = distribution(name)
            except PackageNotFoundError:
                continue
            found[name] = version(name).partition("+")[0]  # an index has no builds with local names, as 2.11.0+cpu
            needs = [Requirement(one) for one in known.requires or ()]
            waiting += [one for one in needs if one.marker is None or one.marker.evaluate({"extra": extra})]
    return tuple(f"{name}=={found[name]}" for name in sorted(found))


def _code(home: Path) -> Iterator[tuple[str, Path]]:
    """Files of the package by their path in it, in one order everywhere."""
    for folder in FOLDERS:
        top = home / folder
        for path in sorted(top.rglob("*")):
            inside = path.relative_to(top)
            if path.is_file() and not any(part[0] == "." or part == "__pycache__" for part in inside.parts):
                yield f"{folder}/{inside.as_posix()}", path


def _of_extra(requirement: str, extra: str) -> str:
    wanted, semicolon, marker = requirement.partition(";")
    return f"{wanted}; ({marker.strip()}) and extra == '{extra}'" if semicolon else f"{wanted}; extra == '{extra}'"


def _metadata(project: Project) -> bytes:
    lines = ["Metadata-Version: 2.1", f"Name: {PACKAGE}", f"Version: {project.version}"]
    lines += [f"Requires-Python: {project.python}"]
    extras = {match[1] for one in project.dependencies if (match := re.search(r"extra == ['\"]([\w.-]+)", one))}
    lines += [f"Provides-Extra: {name}" for name in sorted(extras)]
    lines += [f"Requires-Dist: {one}" for one in project.dependencies]
    return ("\n".join(lines) + "\n").encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


_WHEEL = b"Wheel-Version: 1.0\nGenerator: m2f\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_SCRIPT = b"[console_scripts]\nm2f = m2f.cluster.cli:main\n"
