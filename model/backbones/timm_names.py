"""Check timm model names, usually without importing timm, which takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

_REGISTERED = re.compile(r"@register_model\s+(?:@[^\n]*\s+)*def (\w+)\(")


def name_problem(name: str) -> str | None:
    """Return the end of a message about an unknown timm model or tag, with names that exist; None if the name exists.

    A name may end in a tag of weights: `resnet50.a1_in1k`. If timm is not installed, return None.
    """
    model = without_tag(name)
    if not (known := _registered_names()):
        return None
    if model not in known and not _is_model(model):
        return f"which timm does not have; {nearest(model, known)}"
    return None if name == model else _tag_problem(name)


def without_tag(name: str) -> str:
    """Return the model of a timm name without the tag, which only selects weights: `resnet50` of `resnet50.tv_in1k`."""
    return name.partition(".")[0]


def nearest(name: str, known: Collection[str]) -> str:
    """Return `did you mean A, B?`, or a hint on how to list all names if none is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=5)
    return f"did you mean {', '.join(close)}?" if close else "`timm.list_models()` lists all names"


@lru_cache
def _registered_names() -> frozenset[str]:
    """Return the registered names in the source of the installed timm.

    Deprecated names of renamed models are not among them.
    """
    return frozenset(name for source in _model_sources() for name in _REGISTERED.findall(source))


def _model_sources() -> Iterator[str]:
    """Yield the source files of the installed timm that define models; none if timm is not installed."""
    found = importlib.util.find_spec("timm")
    if found is not None and found.submodule_search_locations:
        for file in sorted(Path(found.submodule_search_locations[0], "models").glob("*.py")):
            yield file.read_text(encoding="utf-8")


def _tag_problem(name: str) -> str | None:
    """Return the end of a message about an unknown tag of a known model, which timm refuses even without weights."""
    if any(f"'{name}'" in source or f'"{name}"' in source for source in _model_sources()):
        return None
    import timm  # some names are not literals in its source

    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        model = without_tag(name)
        known = timm.list_models(f"{model}.*", include_tags=True)
        return f"whose tag timm does not have; known: {', '.join([model, *known])}"
    return None


def _is_model(name: str) -> bool:
    """Return whether timm has a model of this name, including deprecated names."""
    import timm

    return timm.is_model(name)
