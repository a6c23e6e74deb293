"""The classes that a model predicts, and how they map to the classes of a data set.

Classes are identified by name. Ids and order may differ between two tables; colours are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from m2f.data_pipeline.categories import Category, Task
from m2f.data_pipeline.errors import DataError, format_list
from m2f.model.format_count import format_count

_MAX_LISTED_PAIRS = 20
"""Upper limit of differing rows in a message, so that it fits on a screen."""

ClassPair = tuple[Category | None, Category | None]
"""Rows of a class in two tables; None if a table lacks it. In a conflict: two contradicting rows, or a repeated row."""


@dataclass(frozen=True)
class LabelSpace:
    """The classes of one task in label order."""

    task: Task
    classes: tuple[Category, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value that is stored with weights."""
        classes = [{"id": c.id, "name": c.name, "is_thing": c.is_thing, "color": list(c.color)} for c in self.classes]
        return {"task": self.task, "classes": classes}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Self:
        """Build a label space from the value of `to_json`. Raises DataError, naming `source`, if it is invalid."""
        try:
            if content["task"] not in get_args(Task):
                raise DataError(f"{source}: the label space has the unknown task {content['task']!r}")
            classes = [
                Category(
                    int(c["id"]), str(c["name"]), bool(c["is_thing"]), (c["color"][0], c["color"][1], c["color"][2])
                )
                for c in content["classes"]
            ]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{source}: the label space cannot be read ({error!r})") from error
        return cls(content["task"], tuple(classes))


@dataclass(frozen=True)
class ClassMatch:
    """Result of matching a first class table, usually a model's, with a second one, usually a data set's."""

    kind: Literal["equal", "by_name", "subset", "conflict"]
    """equal: same names, kinds and ids in the same order. by_name: same classes in another order or with other ids.
    subset: only some classes are in both tables. conflict: the tables contradict each other or share no class."""
    labels: tuple[int | None, ...]
    """Index in the second table of each class of the first; None if the second table lacks the class."""
    differing: tuple[ClassPair, ...] = ()
    """subset: classes that only one table has. conflict: contradicting rows, or all rows if no class is shared."""

    @property
    def only_first(self) -> tuple[str, ...]:
        """Return the names of the classes that the second table lacks. Do not use it for a conflict."""
        return tuple(first.name for first, second in self.differing if first is not None and second is None)

    @property
    def only_second(self) -> tuple[str, ...]:
        """Return the names of the classes that the first table lacks. Do not use it for a conflict."""
        return tuple(second.name for first, second in self.differing if second is not None and first is None)

    def describe_rows(self, first_name: str, second_name: str) -> str:
        """Return the differing rows of both tables as text, one line per row and at most 20 rows."""
        lines = [
            f"{first_name}: {_class_text(first)}; {second_name}: {_class_text(second)}"
            for first, second in self.differing[:_MAX_LISTED_PAIRS]
        ]
        more = len(self.differing) - _MAX_LISTED_PAIRS
        return "\n  ".join(lines + [f"and {more} more"] * (more > 0))


def match_classes(first: Sequence[Category], second: Sequence[Category], *, ids: bool = True) -> ClassMatch:
    """Match the classes of two tables by name.

    The result is a conflict in these cases:

    - A class is a thing in one table and stuff in the other.
    - Two classes of a table have the same name, unless both tables have the same names and kinds in the same order.
    - The tables share no class.
    - With `ids`: both tables use an id for different classes, and neither class is in the other table. Most probably,
      it is one class under two names.
    """
    if _class_keys(first) == _class_keys(second):
        kind = "equal" if [c.id for c in first] == [c.id for c in second] else "by_name"
        return ClassMatch(kind, tuple(range(len(first))))
    index_by_name = {category.name: index for index, category in enumerate(second)}
    names = {category.name for category in first}
    labels = tuple(index_by_name.get(category.name) for category in first)
    only_in_first = [category for category in first if category.name not in index_by_name]
    only_in_second = [category for category in second if category.name not in names]
    conflicts: list[ClassPair] = [
        (category, second[label])
        for category, label in zip(first, labels, strict=True)
        if label is not None and category.is_thing != second[label].is_thing
    ]
    conflicts += [(category, None) for category in _find_duplicates(first)] + [
        (None, c) for c in _find_duplicates(second)
    ]
    if ids:
        by_id = {category.id: category for category in only_in_second}
        conflicts += [(category, by_id[category.id]) for category in only_in_first if category.id in by_id]
    differing: list[ClassPair] = [(category, None) for category in only_in_first] + [
        (None, category) for category in only_in_second
    ]
    if conflicts or all(label is None for label in labels):
        return ClassMatch("conflict", labels, tuple(conflicts or differing))
    return ClassMatch("subset" if differing else "by_name", labels, tuple(differing))


def require_match(
    first: Sequence[Category], second: Sequence[Category], first_name: str, second_name: str, *, ids: bool = True
) -> ClassMatch:
    """Return the result of `match_classes`. Raises DataError, listing the differing rows, for a conflict."""
    match = match_classes(first, second, ids=ids)
    if match.kind == "conflict":
        raise DataError(
            f"the classes of {first_name} and of {second_name} contradict each other; give the same class the same "
            f"name and kind in both:\n  {match.describe_rows(first_name, second_name)}"
        )
    return match


def describe_subset(match: ClassMatch, first_name: str, second_name: str) -> str | None:
    """Return one line that names the classes that only one table has; None unless the match is a subset."""
    if match.kind != "subset":
        return None
    common = sum(label is not None for label in match.labels)
    parts = [f"{format_count(common, 'class', 'classes')} in both"]
    for names, other_name in ((match.only_first, second_name), (match.only_second, first_name)):
        if names:
            parts.append(f"{other_name} lacks {format_list(names, 8)}")
    return "; ".join(parts)


def _class_keys(classes: Sequence[Category]) -> list[tuple[str, bool]]:
    return [(category.name, category.is_thing) for category in classes]


def _find_duplicates(classes: Sequence[Category]) -> list[Category]:
    counts = Counter(category.name for category in classes)
    return [category for category in classes if counts[category.name] > 1]


def _class_text(category: Category | None) -> str:
    if category is None:
        return "-"
    return f"id {category.id} {category.name!r} ({'thing' if category.is_thing else 'stuff'})"
