"""Tables of settings that were deleted or renamed since earlier versions, and functions that apply the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m2f.data_pipeline.config import StorageConfig
from m2f.trainer.config import TrainingConfig


@dataclass(frozen=True)
class Retired:
    """A deleted setting. A recipe may still contain its old default; any other value is an error."""

    path: str
    """Dotted path; `*` matches one name or index, as in `datasets.*.source.seed`."""
    default: object
    """Old default as parsed YAML: a list for a tuple, a mapping for a section."""
    remedy: str
    """Advice in the imperative, which ends the error message."""


@dataclass(frozen=True)
class Renamed:
    """A renamed setting. Its old name is accepted for one version, with a hint."""

    path: str
    """Dotted path with the old name; `*` matches one name or index."""
    name: str
    """New name in the same section."""


RETIRED: tuple[Retired, ...] = (
    Retired("data.augment_on", "cpu", "remove it: the loader's processes augment all images"),
    Retired("cluster.backend", "auto", "remove it: workers with GPUs use nccl, others gloo"),
    Retired("storage.max_attempts", 8, "remove it, and set storage.patience_s: requests are retried for that time"),
    Retired(
        "storage.connect_timeout_s", 10.0, "remove it, and set storage.read_timeout_s, which also limits connecting"
    ),
)
"""All deleted settings."""

RENAMED: tuple[Renamed, ...] = ()
"""Settings renamed in this version. The entries are removed in the next version."""


def apply_renames(tree: Any, problems: list[str], renamed: Sequence[Renamed] = RENAMED) -> list[str]:
    """Rename settings in the tree of a recipe in place, and return one hint per renamed setting.

    If a section has both names, a message is added to `problems`.
    """
    hints: list[str] = []
    for rename in renamed:
        for path, section, key in _find_settings(tree, rename.path):
            if rename.name in section:
                problems.append(f"`{path}` is the old name of `{rename.name}`, and both are set; keep the new one")
            else:
                section[rename.name] = section[key]
                hints.append(f"`{path}` is now called `{rename.name}`; the next version will not accept the old name")
            del section[key]
    return hints


def renamed_path(path: str, renamed: Sequence[Renamed] = RENAMED) -> str:
    """Return the dotted path of an override with old names replaced by new ones."""
    keys = path.split(".")
    for rename in renamed:
        pattern = rename.path.split(".")
        if len(keys) >= len(pattern) and all(p in ("*", key) for p, key in zip(pattern, keys, strict=False)):
            keys[len(pattern) - 1] = rename.name
    return ".".join(keys)


def drop_retired(tree: Any, problems: list[str], retired: Sequence[Retired] = RETIRED) -> None:
    """Remove deleted settings from the tree of a recipe in place.

    For each setting whose value is not the old default, a message is added to `problems`.
    """
    for setting in retired:
        for path, section, key in _find_settings(tree, setting.path):
            value = section.pop(key)
            if value != setting.default:
                problems.append(f"`{path}` is {value!r}, but this version has no such setting; {setting.remedy}")


def raise_collective_timeout(tree: Any) -> str | None:
    """Raise `training.collective_timeout_s` in a recipe stored by a version without `storage.patience_s`.

    The timeout must exceed the default patience plus the stall timeout. Returns a message, or None if nothing changes.
    Call this before `drop_retired`, which removes the setting that identifies these recipes.
    """
    stored = [
        section
        for path in ("storage.max_attempts", "training.collective_timeout_s")
        for _, section, _ in _find_settings(tree, path)
    ]
    if len(stored) < 2:
        return None
    training, default = stored[1], TrainingConfig(max_steps=1)
    value = training["collective_timeout_s"]
    longest = StorageConfig().patience_s + float(training.get("stall_timeout_s", default.stall_timeout_s))
    if not isinstance(value, int | float) or value > longest:
        return None
    training["collective_timeout_s"] = max(default.collective_timeout_s, longest + 300.0)
    return (
        f"`training.collective_timeout_s` is raised from {value:g} to {training['collective_timeout_s']:g}, so "
        "that it exceeds storage.patience_s + training.stall_timeout_s"
    )


def _find_settings(node: Any, path: str, above: str = "") -> list[tuple[str, dict[str, Any], str]]:
    """Return all settings that match `path`, each with its full path, the section that contains it, and its key."""
    key, _, rest = path.partition(".")
    if isinstance(node, dict):
        names: list[Any] = list(node) if key == "*" else [key] if key in node else []
    else:
        names = list(range(len(node))) if isinstance(node, list) and key == "*" else []
    if not rest:
        return [(f"{above}{name}", node, name) for name in names if isinstance(node, dict)]
    return [found for name in names for found in _find_settings(node[name], rest, f"{above}{name}.")]
