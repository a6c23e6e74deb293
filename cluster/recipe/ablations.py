"""Recipes by name: `NAME` is a file in `configs/`, and `NAME+ROW` adds rows of `configs/ablations.yaml`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import m2f
from m2f.data_pipeline.documents import parse_yaml
from m2f.model.errors import ConfigError

CONFIGS = m2f.HOME / "configs"
TABLE = CONFIGS / "ablations.yaml"


@dataclass(frozen=True)
class Ablation:
    """A named change of a base recipe."""

    name: str
    overrides: tuple[str, ...]
    """Overrides `section.key=value`, as on the command line."""
    published: Mapping[str, str]
    """Result in the paper by base recipe. The ablation is valid for these bases only."""
    extra: Mapping[str, tuple[str, ...]]
    """Additional overrides by base recipe."""

    def overrides_of(self, base: str) -> tuple[str, ...]:
        """Return all overrides for a base recipe."""
        return self.overrides + self.extra.get(base, ())


@cache
def ablations() -> dict[str, Ablation]:
    """Return the ablations of `TABLE` by name."""
    return {name: _ablation(name, content) for name, content in parse_yaml(TABLE.read_bytes()).items()}


def find_recipe(recipe: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file and the overrides of a recipe, given as a path, a `NAME` of a file in `configs/`, or `NAME+ROW`.

    A path is returned even if the file does not exist; the caller's attempt to open it reports the error.

    Raises:
        ConfigError: the name is unknown (the message suggests similar names), the row is not valid for the recipe, or
            two rows set the same setting to different values.
    """
    text = str(recipe)
    if os.path.isfile(text) or "/" in text or text.endswith((".yaml", ".yml")):
        return Path(text), ()
    base, *names = text.split("+")
    files = {path.stem: path for path in CONFIGS.rglob("*.yaml") if path != TABLE}
    if base not in files:
        raise ConfigError(
            f"no recipe is named {base!r}{_did_you_mean(base, files)}; give a path or the name of a file in configs/"
        )
    settings: dict[str, str] = {}
    for name in names:
        ablation = ablations().get(name)
        if ablation is None:
            raise ConfigError(f"{text}: no ablation is named {name!r}{_did_you_mean(name, ablations())} (see {TABLE})")
        if base not in ablation.published:
            raise ConfigError(
                f"{text}: the ablation {name!r} applies to {', '.join(ablation.published)}, not to {base}"
            )
        added = dict(override.split("=", 1) for override in ablation.overrides_of(base))
        for setting, value in added.items():
            if settings.get(setting, value) != value:
                raise ConfigError(
                    f"{text}: the ablation {name!r} sets {setting} to {value}, but an earlier one sets it to "
                    f"{settings[setting]}; choose one of them"
                )
        settings |= added
    if names:
        settings["name"] = "_".join([base, *names])
    return files[base], tuple(f"{setting}={value}" for setting, value in settings.items())


def _ablation(name: str, content: Mapping[str, Any]) -> Ablation:
    bases: Mapping[str, str | Mapping[str, Any]] = content["bases"]
    published = {base: each if isinstance(each, str) else str(each["published"]) for base, each in bases.items()}
    extra = {base: _overrides(each["overrides"]) for base, each in bases.items() if not isinstance(each, str)}
    return Ablation(name, _overrides(content["overrides"]), published, extra)


def _overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())  # JSON is valid YAML on one line


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    found = [other for other in known if other.startswith(name)][:3]
    found = found or get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(found)}?)" if found else ""
