"""Metadata of m2f for installers: version, required Python and requirements."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.metadata import distribution

import m2f

PACKAGE = "m2f"


@dataclass(frozen=True)
class Project:
    """Metadata of m2f for an installer."""

    version: str
    python: str
    """Required Python versions, such as `>=3.11`."""
    dependencies: tuple[str, ...]
    """Requirements; the marker of a requirement names the extra that it belongs to."""


def read_project() -> Project:
    """Return the metadata of m2f from pyproject.toml in a checkout, else from the installed package.

    In a checkout, the installed metadata may be outdated.
    """
    file = m2f.ROOT / "pyproject.toml"
    if not file.is_file():
        found = distribution(PACKAGE)
        return Project(found.version, found.metadata["Requires-Python"], tuple(found.requires or ()))
    table = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {})
    return Project(
        m2f.__version__,
        table["requires-python"],
        (
            *table["dependencies"],
            *(_with_extra_marker(requirement, name) for name, needs in extras.items() for requirement in needs),
        ),
    )


def _with_extra_marker(requirement: str, extra: str) -> str:
    package, semicolon, marker = requirement.partition(";")
    return f"{package}; ({marker.strip()}) and extra == '{extra}'" if semicolon else f"{package}; extra == '{extra}'"
