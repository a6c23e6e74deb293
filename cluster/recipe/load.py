"""Build a RunConfig from YAML and overrides. All problems are reported in one error, by the path of their setting."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from m2f.cluster.recipe.ablations import find_recipe
from m2f.cluster.recipe.config import RunConfig, cross_section_problems, url_problems
from m2f.cluster.recipe.defaults import fill_defaults, fill_input_rules
from m2f.cluster.recipe.metrics import metric_problems
from m2f.cluster.recipe.paths import with_absolute_paths
from m2f.cluster.recipe.retired import apply_renames, drop_retired, raise_collective_timeout, renamed_path
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.urls import without_secrets
from m2f.model.backbones.timm_names import name_problem
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count
from m2f.model.limits import range_problems, ranges_of

LOGGER = logging.getLogger(__name__)

_INVALID = object()
"""Placeholder for a value whose problem is already recorded, so that one mistake causes one message."""

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
"""`${NAME}` or `${NAME:-default}`: environment variables, so that a recipe works on several machines."""


def load_recipe(path: str | Path, overrides: Iterable[str] = (), *, for_training: bool = False) -> RunConfig:
    """Read a recipe and apply `section.key=value` overrides. Relative paths are relative to the current directory.

    `path` is a file, or a name for `find_recipe`: `coco_panoptic_r50`, `coco_panoptic_r50+cross_attention`. With
    `for_training`, the evaluation sets must compute the metrics that training uses, see `RunConfig.check_metrics`.

    Raises:
        ConfigError: the file cannot be read, or the recipe is invalid; the message lists all problems.
    """
    file, first = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot read the recipe ({reason}); give the path of a YAML file") from error
    return _load(text, (*first, *overrides), str(path), for_training)


def recipe_from_tree(
    tree: Mapping[str, Any], overrides: Iterable[str] = (), *, for_training: bool = False
) -> RunConfig:
    """Build a RunConfig like `load_recipe`, from nested dictionaries, lists and scalars.

    NumPy numbers and paths are accepted. Raises ConfigError with all problems, or for the first value of another type.
    """
    text = yaml.safe_dump(plain_value(_to_tree(tree), ""))
    return _load(text, overrides, "the recipe", for_training)


def _load(text: str, overrides: Iterable[str], source: str, for_training: bool) -> RunConfig:
    """Return the recipe of a user, with absolute paths, and log its hints."""
    config, hints = _build_recipe(text, overrides, source, for_training=for_training)
    for hint in hints:
        LOGGER.warning("%s: %s", source, hint)
    return with_absolute_paths(config)


def plain_value(value: Any, path: str) -> Any:
    """Return the value of the setting `path` as the dicts, lists and scalars of YAML.

    NumPy numbers become numbers, and paths become strings. Raises ConfigError, which names the setting, for other
    types.
    """
    if isinstance(value, Mapping):
        return {plain_value(key, path): plain_value(item, _join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, _join(path, index)) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"`{path}` has the type {type(value).__name__}; only dictionaries, lists, strings, paths, numbers and None "
            "can be set"
        ) from error
    return value


def parse_recipe(text: str, overrides: Iterable[str] = (), source: str = "recipe") -> RunConfig:
    """Build a RunConfig from the text of a stored recipe.

    In contrast to `load_recipe`, paths stay as written, and old names of settings cause no hint. Possible secrets in
    URLs, which earlier versions stored, are removed with a warning. Raises ConfigError, whose message names `source`.
    """
    return _build_recipe(text, overrides, source, is_stored=True)[0]


def _build_recipe(
    text: str, overrides: Iterable[str], source: str, *, is_stored: bool = False, for_training: bool = False
) -> tuple[RunConfig, list[str]]:
    """Return the recipe, and hints about settings with an old name and about values that were changed or filled in."""
    problems: list[str] = []
    tree = _parse_yaml(text, source)
    if is_stored:
        tree = _without_secrets(tree, source)
    hints = apply_renames(tree, problems)
    if raised := raise_collective_timeout(tree):
        hints.append(raised)
    for override in overrides:
        _apply_override(tree, override, problems)
    drop_retired(tree, problems)
    tree = _expand_variables(tree, "", problems)
    fill_defaults(tree)
    hints += fill_input_rules(tree)
    settings = {f.name: _default_of(f) for f in dataclasses.fields(RunConfig)}
    settings |= _build_settings(RunConfig, tree, "", problems)
    valid = {name: value for name, value in settings.items() if value is not _INVALID}
    problems += cross_section_problems(**valid)
    if for_training and {"training", "evaluation"} <= valid.keys():
        problems += metric_problems(valid["training"], valid["evaluation"])
    if not is_stored:  # a stored name may be that of an earlier timm version; building the model reports this
        problems += _unknown_backbones(tree)
    require_no_problems(source, problems)
    return RunConfig(**settings), hints


def _unknown_backbones(tree: dict[str, Any]) -> list[str]:
    """Return a message if the backbone names a timm model that does not exist. The tree may have other problems."""
    model = tree.get("model")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    if not isinstance(backbone, dict):
        return []
    key = "pretrained" if backbone.get("kind") == "swin" else "name"
    name = backbone.get(key)
    problem = name_problem(name) if isinstance(name, str) else None
    return [] if problem is None else [f"`model.backbone.{key}` is {name!r}, {problem}"]


def require_no_problems(source: str, problems: Sequence[str]) -> None:
    """Raise ConfigError with all problems of a recipe, if there are any."""
    if problems:
        raise ConfigError(f"{source}: {format_count(len(problems), 'problem')}\n  " + "\n  ".join(problems))


def dump_recipe(config: RunConfig) -> str:
    """Return the complete recipe with all defaults as YAML; loading the text returns an equal RunConfig."""
    return yaml.safe_dump(_to_tree(config), sort_keys=False, width=100)


def describe_changes(before: Mapping[str, str], after: Mapping[str, str], keys: Iterable[str]) -> tuple[str, ...]:
    """Return lines `setting: before -> after` for the settings in `keys` that differ."""
    return tuple(
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(keys)
        if before.get(key) != after.get(key)
    )


def flatten(config: RunConfig) -> dict[str, str]:
    """Return all settings as `{dotted path: text}`, with indices for lists, as MLflow stores them as parameters."""
    return flatten_tree(_to_tree(config))


def flatten_tree(tree: Any) -> dict[str, str]:
    """Flatten a YAML tree with arbitrary keys, so that recipes of other versions can be compared.

    Possible secrets in URLs are removed.
    """
    return dict(_leaves(tree, ""))


# Reading YAML


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except DocumentError as error:
        raise ConfigError(f"{source}: not valid YAML\n  {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: a recipe must be a YAML mapping of sections, but this is {_describe_value(tree)}")
    return tree


def _expand_variables(node: Any, path: str, problems: list[str]) -> Any:
    """Return the tree with `${NAME}` and `${NAME:-default}` in its strings replaced from the environment."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            problems.append(
                f"`{path}`: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
        return found or ""

    if isinstance(node, dict):
        return {key: _expand_variables(child, f"{path}.{key}".lstrip("."), problems) for key, child in node.items()}
    if isinstance(node, list):
        return [_expand_variables(child, f"{path}.{index}", problems) for index, child in enumerate(node)]
    return _VARIABLE.sub(value, node) if isinstance(node, str) else node


def _without_secrets(node: Any, source: str, path: str = "") -> Any:
    """Return the tree of a stored recipe without possible secrets in its URLs; log a warning for each of them."""
    if isinstance(node, dict):
        return {key: _without_secrets(child, source, _join(path, key)) for key, child in node.items()}
    if isinstance(node, list):
        return [_without_secrets(child, source, _join(path, index)) for index, child in enumerate(node)]
    if not isinstance(node, str) or (kept := without_secrets(node)) == node:
        return node
    LOGGER.warning(f"{source}: the URL in `{path}` may contain a secret, so it is read as {kept}; change that secret")
    return kept


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Apply an override `a.b.0.c=value` to the tree; missing sections are created."""
    path, equals, text = override.partition("=")
    keys = renamed_path(path.strip()).split(".")
    if not equals or not all(keys):
        problems.append(f"`{override}`: write an override as section.key=value, for example training.max_steps=100")
        return
    try:
        value = parse_yaml(text)
    except DocumentError:
        problems.append(f"`{override}`: the value is not valid YAML; quote it for the shell, for example 'a.b=[1, 2]'")
        return
    node: Any = tree
    for depth, key in enumerate(keys):
        parent_path = ".".join(keys[:depth])
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                problems.append(
                    f"`{override}`: `{parent_path}` is a list of length {len(node)}; `{key}` is not a valid index"
                )
                return
            key = int(key)
        elif isinstance(node, dict):
            key = next((name for name in node if str(name) == key), key)  # YAML reads the name 2017 as a number
        else:
            problems.append(f"`{override}`: `{parent_path}` is {_describe_value(node)}, not a section")
            return
        if last:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]


# Building the configuration


def _build(hint: Any, value: Any, path: str, problems: list[str], default: Any = None) -> Any:
    """Return the value converted to the type `hint`, or _INVALID with the reasons in `problems`.

    `default` is the default of the field. If a section of a union has no `kind`, the kind of the default is used.
    """
    sections = sections_in(hint)
    if value is None and type(None) in get_args(hint):
        return None
    if sections and get_origin(hint) in (None, Union, types.UnionType):
        return _build_section(sections, value, path, problems, default)
    if sections and get_origin(hint) is tuple:
        if not isinstance(value, list):
            return _add_problem(problems, f"`{path}`: expected a list, got {_describe_value(value)}")
        item_hint = get_args(hint)[0]
        items = tuple(_build(item_hint, item, f"{path}.{i}", problems) for i, item in enumerate(value))
        return _INVALID if _INVALID in items else items
    if sections and get_origin(hint) is Mapping:
        if not isinstance(value, dict):
            return _add_problem(problems, f"`{path}`: expected a mapping of names, got {_describe_value(value)}")
        item_hint = get_args(hint)[1]
        named = {str(name): _build(item_hint, item, f"{path}.{name}", problems) for name, item in value.items()}
        return _INVALID if _INVALID in named.values() else named
    return _build_leaf(hint, value, path, problems)


def _build_section(sections: tuple[type, ...], value: Any, path: str, problems: list[str], default: Any) -> Any:
    """Build one dataclass. For a union, `kind` selects the member before its settings are checked."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        return _add_problem(problems, f"`{path}`: expected a section, got {_describe_value(value)}")
    section = _choose_section(sections, value, default)
    if section is None:
        kinds = [str(kind_tag(s)) for s in sections]
        if "kind" not in value:
            return _add_problem(problems, f"`{path}.kind` is missing; set it to one of {', '.join(kinds)}")
        return _add_problem(
            problems, f"`{path}.kind`: no such kind {value['kind']!r}{suggestion(str(value['kind']), kinds)}"
        )
    settings = _build_settings(section, value, path, problems)
    try:
        if any(value is _INVALID for value in settings.values()):
            _check_valid_settings(section, settings)
            return _INVALID
        return section(**settings)
    except ConfigError as error:  # a check across settings, whose message names them
        return _add_problem(problems, str(error))


class _InvalidSettingReadError(Exception):
    """Raised if a check across settings reads a setting that is invalid itself."""


def _check_valid_settings(section: type, settings: Mapping[str, Any]) -> None:
    """Run the checks across settings of a section that has invalid settings, up to the first that reads one of them.

    Raises ConfigError if a check fails.
    """

    class Checked(section):
        def __getattribute__(self, name: str) -> Any:
            if settings.get(name) is _INVALID:
                raise _InvalidSettingReadError
            return super().__getattribute__(name)

    checked = object.__new__(Checked)
    for field in dataclasses.fields(section):
        value = settings[field.name] if field.name in settings else _default_of(field)
        if value is not _INVALID:
            object.__setattr__(checked, field.name, value)
    with suppress(_InvalidSettingReadError):
        checked.__post_init__()


def _build_settings(section: type, value: Mapping[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """Return the settings of a section by name; _INVALID for a setting with a problem, or a missing required one."""
    fields = {f.name: f for f in dataclasses.fields(section)}
    hints = type_hints(section)
    for key in value:
        if key not in fields:
            close = suggestion(str(key), list(fields))
            problems.append(f"`{_join(path, key)}`: no such setting in {section.__name__}{close}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _build(hints[name], value[name], _join(path, name), problems, _default_of(field))
            if range_errors := range_problems(_join(path, name), arguments[name], ranges_of(section).get(name)):
                arguments[name] = _INVALID
                problems += range_errors
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind = getattr(hints[name], "__name__", "see m2f config --explain")
            message = f"`{_join(path, name)}` is missing; {section.__name__} requires it ({kind})"
            arguments[name] = _add_problem(problems, message)
    return arguments


def _build_leaf(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    kinds = {hint, *get_args(hint)}
    if isinstance(value, bool) and not kinds.isdisjoint((int, float)) and bool not in kinds:
        return _add_problem(problems, f"`{path}`: expected a number, got {str(value).lower()}")
    if url_errors := url_problems(value, path):
        problems += url_errors
        return _INVALID
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            inner = ".".join(str(part) for part in detail["loc"] if isinstance(part, int))
            message = detail["msg"]
            problems.append(f"`{_join(path, inner)}`: {message[:1].lower()}{message[1:]} (got {detail['input']!r})")
        return _INVALID


@lru_cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    # Not strict, because PyYAML reads `1e-4` as a string, which pydantic converts to a float.
    return TypeAdapter(hint)


@lru_cache
def type_hints(section: type) -> dict[str, Any]:
    """Return the resolved type hints of a dataclass."""
    return get_type_hints(section)


def sections_in(hint: Any) -> tuple[type, ...]:
    """Return the dataclasses in a type hint: the hint itself, members of a union, or items of a tuple or mapping."""
    if dataclasses.is_dataclass(hint):
        return (hint,) if isinstance(hint, type) else ()
    if get_origin(hint) is Literal:
        return ()
    return tuple(section for part in get_args(hint) for section in sections_in(part))


def _choose_section(sections: tuple[type, ...], value: Mapping[str, Any], default: Any) -> type | None:
    by_kind = {kind_tag(s): s for s in sections}
    if len(sections) == 1 and ("kind" not in value or None in by_kind):  # without a tag, `kind` is an unknown setting
        return sections[0]
    if "kind" not in value:
        return next((s for s in sections if isinstance(default, s)), None)
    return by_kind.get(value["kind"]) if isinstance(value["kind"], str) else None


def kind_tag(section: type) -> str | None:
    """Return the value of a section's `kind: Literal[...]` field; None if it has no such field."""
    hint = type_hints(section).get("kind")
    return get_args(hint)[0] if get_origin(hint) is Literal else None


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


# Messages


def _add_problem(problems: list[str], problem: str) -> object:
    problems.append(problem)
    return _INVALID


def _join(path: str, key: object) -> str:
    return f"{path}.{key}".strip(".")


def suggestion(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: the closest known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def _describe_value(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"the value {value!r}"


def _to_tree(value: Any) -> Any:
    """Return dataclasses, tuples and mappings as the dicts, lists and scalars of YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: _to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_tree(item) for item in value]
    return value


def _leaves(value: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, _join(path, key))
    else:
        yield path, without_secrets(str(value))
