"""Whether timm has a model of a name, mostly without importing timm, which takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

_REGISTERED = re.compile(r"@register_model\s+(?:@[^\n]*\s+)*def (\w+)\(")


def name_problem(name: str) -> str | None:
    """The end of a message about a name that timm does not have, with the nearest ones; None for one that it has.

    A name may end in a tag of weights: `resnet50.a1_in1k`. Without timm nothing is found out.
    """
    architecture = name.partition(".")[0]
    if not (known := _written_names()) or architecture in known or _is_model(architecture):
        return None
    return f"which timm does not have; {nearest(architecture, known)}"


def nearest(name: str, known: Collection[str]) -> str:
    """`did you mean A, B?`, else where all names are."""
    close = difflib.get_close_matches(name, sorted(known), n=5)
    return f"did you mean {', '.join(close)}?" if close else "`timm.list_models()` lists all names"


@lru_cache
def _written_names() -> frozenset[str]:
    """Names in the source of the installed timm, but for old names of models that were renamed."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    files = sorted(Path(found.submodule_search_locations[0], "models").glob("*.py"))
    return frozenset(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))


def _is_model(name: str) -> bool:
    """What timm itself says."""
    import timm

    return timm.is_model(name)
