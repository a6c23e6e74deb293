"""JSON and YAML from untrusted files. Parsing has bounded cost and raises one type of error."""

from __future__ import annotations

import json
from typing import Any

import yaml

from m2f.data_pipeline.errors import DataError

MAX_YAML_BYTES = 2_000_000
"""Upper limit of a document. A complete recipe has 10 KB; PyYAML takes a second per 100 KB."""
MAX_YAML_DEPTH = 64
"""Upper limit of nested levels. Recipes have fewer than ten; PyYAML's recursion fails at some hundreds."""
MAX_YAML_NODES = 100_000
"""Upper limit of values with all aliases expanded. Nine lines of nested aliases can expand to 10^9 values."""

_INTEGERS = range(-(2**63), 2**64)


class DocumentError(DataError):
    """Raised if a document cannot be read. The message gives the reason; callers add the document's name."""


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON document.

    Integers of more than 64 bits are allowed, because ids of annotations are often long. Each reader checks its fields.

    Raises:
        DocumentError: the document is invalid, is nested too deeply, or holds an integer of more than 4300 digits.
    """
    content = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    try:
        return json.loads(content)
    except RecursionError:
        raise DocumentError("its brackets are nested too deeply") from None
    except ValueError as error:
        raise DocumentError(str(error)) from error


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a text with a single YAML document.

    Raises:
        DocumentError: the document is invalid or too long, repeats a key in a mapping, or exceeds a limit: depth of
            nesting, number of values with aliases expanded, or 64 bits per integer.
    """
    if len(text) > MAX_YAML_BYTES:
        raise DocumentError(f"it has {len(text)} bytes; the limit is {MAX_YAML_BYTES}")
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except DocumentError:
        raise
    # PyYAML does not wrap Python's errors for `!!int x`, `!!bool x`, 2001-99-99 or a number of 5000 digits.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DocumentError(" ".join(str(error).split())) from error


def _require_64_bits(value: int, digits: str) -> int:
    if value not in _INTEGERS:
        raise DocumentError(f"the integer {digits[:24]} has more than 64 bits")
    return value


class _BoundedLoader(yaml.SafeLoader):
    """SafeLoader that limits depth and size, and refuses repeated keys. PyYAML would keep the last value."""

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self._depth = 0
        self._extents: dict[int, tuple[int, int]] = {}  # id of a complete node -> number of values and depth

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= MAX_YAML_DEPTH:
            raise self._limit_error(f"nested deeper than {MAX_YAML_DEPTH} levels")
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            if id(node) not in self._extents:
                if is_alias:
                    raise self._limit_error("an alias contains itself")
                self._extents[id(node)] = self._extent(node)
            values, depth = self._extents[id(node)]
            if values > MAX_YAML_NODES:
                raise self._limit_error(f"more than {MAX_YAML_NODES} values after expansion of aliases")
            if self._depth + depth > MAX_YAML_DEPTH:
                raise self._limit_error(f"nested deeper than {MAX_YAML_DEPTH} levels")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise DocumentError(
                    f"the key `{key}` is written twice (lines {seen[key]} and {line}); keep one of them"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return _require_64_bits(super().construct_yaml_int(node), node.value)

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        """Return the number of values and the depth of a node, both with its aliases expanded."""
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        extents = [self._extents[id(child)] for child in children]
        return 1 + sum(values for values, _ in extents), 1 + max((depth for _, depth in extents), default=0)

    def _limit_error(self, what: str) -> DocumentError:
        return DocumentError(f"line {self.line + 1}: {what}")


_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.construct_yaml_int)
